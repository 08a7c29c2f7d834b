/* What kernels that call tl.extra.libdevice include besides runtime.h: functions that <math.h> does not have, rounding in a
 * given direction, conversions that saturate. */
/* What tl.extra.libdevice has beyond <math.h>, each by its name there.
 *
 * Sums and products that are rounded by themselves, though the compiler may join the kernel's multiplications and
 * additions: it leaves a fused operation as it is, also when it vectorises. */
#if defined(__clang__) && (defined(__x86_64__) || defined(__aarch64__))
#ifdef __x86_64__
#define TW_KEEP_IN "+x"
#else
#define TW_KEEP_IN "+w"
#endif
#define TW_SINGLE(type, suffix)                                                                                \
    TW_INLINE type tw_keep##suffix(type a) { __asm__("" : TW_KEEP_IN(a)); return a; }                          \
    TW_INLINE type tw_sum##suffix(type a, type b) { return tw_keep##suffix(a) + tw_keep##suffix(b); }          \
    TW_INLINE type tw_product##suffix(type a, type b) { return tw_keep##suffix(a * b); }
#elif defined(__FP_FAST_FMA)
#define TW_SINGLE(type, suffix)                                                                                \
    TW_INLINE type tw_keep##suffix(type a) { return __builtin_fma##suffix(a, 1, (type)-0.0); }                 \
    TW_INLINE type tw_sum##suffix(type a, type b) { return __builtin_fma##suffix(a, 1, b); }                   \
    TW_INLINE type tw_product##suffix(type a, type b) { return __builtin_fma##suffix(a, b, (type)-0.0); }
#else
#define TW_SINGLE(type, suffix)                                                                                \
    TW_INLINE type tw_keep##suffix(type a) { return a; }                                                       \
    TW_INLINE type tw_sum##suffix(type a, type b) { return a + b; }                                            \
    TW_INLINE type tw_product##suffix(type a, type b) { return a * b; }
#endif
TW_SINGLE(float, f)
TW_SINGLE(double, )

/* Directed rounding: `near` is the nearest number to a result that is larger by `error`, of which only the sign counts;
 * `mode` is -1 for down, 0 for towards zero, 1 for up. */
#define TW_DIRECT(type, suffix, bits_type, bits_of, of_bits)                                                   \
    TW_INLINE type tw_direct##suffix(type near, double error, int mode) {                                      \
        bool down = (error < 0) & ((mode < 0) | ((mode == 0) & (near > 0)));                                   \
        bool up = (error > 0) & ((mode > 0) | ((mode == 0) & (near < 0)));                                     \
        bits_type u = bits_of(near), step = (u < 0) == down ? 1 : -1;                                          \
        type stepped = of_bits(u + step), least = of_bits(1);                                                  \
        stepped = near == 0 ? (down ? -least : least) : stepped;                                               \
        return down | up ? stepped : near;                                                                     \
    }                                                                                                          \
    /* An exact sum that is zero is negative when rounding down, unless both parts are positive zeros. */      \
    TW_INLINE type tw_signed_zero##suffix(type sum, bool negative, int mode) {                                 \
        return (sum == 0) & (mode < 0) & negative ? (type)-0.0 : sum;                                          \
    }
TW_DIRECT(float, f, int32_t, tw_float_bits, tw_bits_float)
TW_DIRECT(double, , int64_t, tw_double_bits, tw_bits_double)

TW_INLINE float tw_narrow(double x, int mode) {
    double kept = tw_keep(x);
    float near = (float)kept;
    return tw_directf(near, kept - (double)near, mode);
}
TW_INLINE float tw_fma_directf(float a, float b, float c, int mode) {
    double product = (double)a * (double)b, sum = tw_odd_fma(a, b, c);
    return tw_narrow(tw_signed_zero(sum, signbit(product) | signbit(c), mode), mode);
}
TW_INLINE float tw_add_directf(float a, float b, int mode) { return tw_fma_directf(a, 1, b, mode); }
TW_INLINE float tw_mul_directf(float a, float b, int mode) { return tw_narrow((double)a * (double)b, mode); }
/* No quotient and no root that is not a float itself is within 2^-48 of one, so rounding to fp64 first does no harm. */
TW_INLINE float tw_div_directf(float a, float b, int mode) { return tw_narrow((double)a / (double)b, mode); }
TW_INLINE float tw_sqrt_directf(float a, int mode) { return tw_narrow(sqrt((double)a), mode); }

TW_INLINE double tw_add_direct(double x, double y, int mode) {
    double a = tw_keep(x), b = tw_keep(y), sum = a + b;
    bool swap = fabs(a) < fabs(b);
    double large = swap ? b : a, small = swap ? a : b;
    return tw_signed_zero(tw_direct(sum, small - (sum - large), mode), signbit(a) | signbit(b), mode);
}
/* What is lost in a small product would be below the range, so the smaller factor is scaled for that. */
TW_INLINE double tw_mul_direct(double a, double b, int mode) {
    double product = tw_product(a, b), scale = fabs(product) < 0x1p-960 ? 0x1p1000 : 1;
    bool swap = fabs(a) < fabs(b);
    double large = swap ? b : a, small = swap ? a : b;
    double error = __builtin_fma(small * scale, large, -(product * scale));
    bool vanished = (product == 0) & (a != 0) & (b != 0);
    return tw_direct(product, vanished ? copysign(1, product) : error, mode);
}
/* `x`, already rounded in that direction, times 2^exponent. */
TW_INLINE double tw_scale_direct(double x, int exponent, int mode) {
    double near = ldexp(x, exponent);
    return tw_direct(near, x - ldexp(near, -exponent), mode);
}
TW_INLINE double tw_div_direct(double a, double b, int mode) {
    if (a == 0 || b == 0 || !(fabs(a) < INFINITY) || !(fabs(b) < INFINITY)) return a / b;
    int a_exponent, b_exponent;
    double x = frexp(a, &a_exponent), y = frexp(b, &b_exponent), near = x / y, rest = __builtin_fma(-near, y, x);
    return tw_scale_direct(tw_direct(near, y < 0 ? -rest : rest, mode), a_exponent - b_exponent, mode);
}
TW_INLINE double tw_sqrt_direct(double a, int mode) {
    bool small = a < 0x1p-900;
    double x = a * (small ? 0x1p200 : 1), root = sqrt(x);
    return tw_direct(root, __builtin_fma(-root, root, x), mode) * (small ? 0x1p-100 : 1);
}
TW_INLINE double tw_sum_error(double a, double b, double sum) {
    double part = sum - a;
    return (a - (sum - part)) + (b - part);
}
/* The operands are scaled to exponents where nothing over- or underflows; one that is negligible is kept at a distance
 * from which it still says on which side of the other the sum lies. The error is that of Boldo and Muller, "Exact and
 * approximated error of the FMA". */
TW_INLINE double tw_fma_direct(double a, double b, double c, int mode) {
    if (!(fabs(a) < INFINITY) || !(fabs(b) < INFINITY) || !(fabs(c) < INFINITY)) return __builtin_fma(a, b, c);
    if (a == 0 || b == 0) return tw_add_direct(a * b, c, mode);
    if (c == 0) return tw_mul_direct(a, b, mode);
    int a_exponent, b_exponent, c_exponent;
    double x = frexp(a, &a_exponent), y = frexp(b, &b_exponent), z = frexp(c, &c_exponent);
    int exponent = a_exponent + b_exponent, shift = c_exponent - exponent;
    shift = shift < -220 ? -220 : shift;
    if (shift > 220) {
        exponent = c_exponent - 220;
        shift = 220;
    }
    z = ldexp(z, shift);
    double near = __builtin_fma(x, y, z), product = tw_product(x, y), low = __builtin_fma(x, y, -product);
    if (near == 0) return mode < 0 ? -0.0 : 0.0;
    double first = z + low, second = product + first;
    double rest = ((second - near) + tw_sum_error(product, first, second)) + tw_sum_error(z, low, first);
    return tw_scale_direct(tw_direct(near, rest, mode), exponent, mode);
}

#define TW_ROUNDED(type, letter, suffix, name, mode)                                                           \
    TW_INLINE type tw_##letter##add_##name(type a, type b) { return tw_add_direct##suffix(a, b, mode); }       \
    TW_INLINE type tw_##letter##sub_##name(type a, type b) { return tw_add_direct##suffix(a, -b, mode); }      \
    TW_INLINE type tw_##letter##mul_##name(type a, type b) { return tw_mul_direct##suffix(a, b, mode); }       \
    TW_INLINE type tw_##letter##div_##name(type a, type b) { return tw_div_direct##suffix(a, b, mode); }       \
    TW_INLINE type tw_##letter##rcp_##name(type a) { return tw_div_direct##suffix(1, a, mode); }               \
    TW_INLINE type tw_##letter##sqrt_##name(type a) { return tw_sqrt_direct##suffix(a, mode); }                \
    TW_INLINE type tw_fma##suffix##_##name(type a, type b, type c) { return tw_fma_direct##suffix(a, b, c, mode); }
#define TW_NEAREST(type, letter, suffix)                                                                       \
    TW_ROUNDED(type, letter, suffix, rz, 0)                                                                    \
    TW_ROUNDED(type, letter, suffix, rd, -1)                                                                   \
    TW_ROUNDED(type, letter, suffix, ru, 1)                                                                    \
    TW_INLINE type tw_##letter##add_rn(type a, type b) { return tw_sum##suffix(a, b); }                        \
    TW_INLINE type tw_##letter##sub_rn(type a, type b) { return tw_sum##suffix(a, -b); }                       \
    TW_INLINE type tw_##letter##mul_rn(type a, type b) { return tw_product##suffix(a, b); }                    \
    TW_INLINE type tw_##letter##div_rn(type a, type b) { return a / b; }                                       \
    TW_INLINE type tw_##letter##rcp_rn(type a) { return 1 / a; }
TW_NEAREST(float, f, f)
TW_NEAREST(double, d, )
TW_INLINE float tw_frsqrt_rn(float a) { return (float)(1 / sqrt((double)a)); }

/* To integers: past the range the end of it, and for NaN what PTX gives. */
TW_INLINE int32_t tw_to_int(double x, int32_t nan) {
    double c = x < 2147483647.0 ? x : 2147483647.0;
    c = c > -2147483648.0 ? c : -2147483648.0;
    return x != x ? nan : (int32_t)c;
}
TW_INLINE int32_t tw_to_uint(double x, int32_t nan) {
    double c = x < 4294967295.0 ? x : 4294967295.0;
    c = c > 0 ? c : 0;
    return x != x ? nan : (int32_t)(uint32_t)(int64_t)c;
}
TW_INLINE int64_t tw_to_ll(double x) {
    double c = x < 0x1p63 ? x : 0;
    c = c > -0x1p63 ? c : -0x1p63;
    int64_t whole = x >= 0x1p63 ? INT64_MAX : (int64_t)c;
    return x != x ? INT64_MIN : whole;
}
TW_INLINE int64_t tw_to_ull(double x) {
    double c = x < 0x1p64 ? x : 0;
    c = c > 0 ? c : 0;
    int64_t whole = x >= 0x1p64 ? -1 : (int64_t)(uint64_t)c;
    return x != x ? INT64_MIN : whole;
}
#define TW_TO_INTEGERS(name, type, suffix, nan, mode, rounded)                                                 \
    TW_INLINE int32_t tw_##name##2int_##mode(type x) { return tw_to_int(rounded##suffix(x), nan); }            \
    TW_INLINE int32_t tw_##name##2uint_##mode(type x) { return tw_to_uint(rounded##suffix(x), nan); }          \
    TW_INLINE int64_t tw_##name##2ll_##mode(type x) { return tw_to_ll(rounded##suffix(x)); }                   \
    TW_INLINE int64_t tw_##name##2ull_##mode(type x) { return tw_to_ull(rounded##suffix(x)); }
#define TW_TO_INTEGERS_IN(mode, rounded)                                                                       \
    TW_TO_INTEGERS(float, float, f, 0, mode, rounded)                                                          \
    TW_TO_INTEGERS(double, double, , INT32_MIN, mode, rounded)
TW_TO_INTEGERS_IN(rn, rint)
TW_TO_INTEGERS_IN(rz, trunc)
TW_TO_INTEGERS_IN(rd, floor)
TW_TO_INTEGERS_IN(ru, ceil)

/* From integers, and from fp64 to fp32. */
#define TW_LONG_TO(type, suffix)                                                                               \
    TW_INLINE type tw_ll2##type##_rn(int64_t x) { return (type)x; }                                            \
    TW_INLINE type tw_ull2##type##_rn(int64_t x) { return (type)(uint64_t)x; }                                 \
    TW_INLINE type tw_wide2##type(__int128 x, type near, int mode) {                                           \
        __int128 error = x - (__int128)near;                                                                   \
        return tw_direct##suffix(near, (error > 0) - (error < 0), mode);                                       \
    }
TW_LONG_TO(float, f)
TW_LONG_TO(double, )
TW_INLINE float tw_double2float_rn(double x) { return (float)x; }
TW_INLINE float tw_int2float_rn(int32_t x) { return (float)x; }
TW_INLINE float tw_uint2float_rn(int32_t x) { return (float)(uint32_t)x; }
TW_INLINE double tw_int2double_rn(int32_t x) { return (double)x; }
TW_INLINE double tw_uint2double_rn(int32_t x) { return (double)(uint32_t)x; }
#define TW_FROM(name, mode)                                                                                    \
    TW_INLINE float tw_double2float_##name(double x) { return tw_narrow(x, mode); }                            \
    TW_INLINE float tw_int2float_##name(int32_t x) { return tw_narrow((double)x, mode); }                      \
    TW_INLINE float tw_uint2float_##name(int32_t x) { return tw_narrow((double)(uint32_t)x, mode); }           \
    TW_INLINE float tw_ll2float_##name(int64_t x) { return tw_wide2float(x, (float)x, mode); }                 \
    TW_INLINE double tw_ll2double_##name(int64_t x) { return tw_wide2double(x, (double)x, mode); }             \
    TW_INLINE float tw_ull2float_##name(int64_t x) { return tw_wide2float((uint64_t)x, (float)(uint64_t)x, mode); } \
    TW_INLINE double tw_ull2double_##name(int64_t x) { return tw_wide2double((uint64_t)x, (double)(uint64_t)x, mode); }
TW_FROM(rz, 0)
TW_FROM(rd, -1)
TW_FROM(ru, 1)
TW_INLINE double tw_hiloint2double(int32_t high, int32_t low) {
    return tw_bits_double((int64_t)((uint64_t)(uint32_t)high << 32 | (uint32_t)low));
}
TW_INLINE int32_t tw_double2loint(double x) { return (int32_t)tw_double_bits(x); }
TW_INLINE int32_t tw_double2hiint(double x) { return (int32_t)(tw_double_bits(x) >> 32); }

/* Integers. */
TW_INLINE int32_t tw_brev(int32_t x) {
    uint32_t u = __builtin_bswap32((uint32_t)x);
    u = (u >> 4 & 0x0f0f0f0fu) | (u & 0x0f0f0f0fu) << 4;
    u = (u >> 2 & 0x33333333u) | (u & 0x33333333u) << 2;
    return (int32_t)((u >> 1 & 0x55555555u) | (u & 0x55555555u) << 1);
}
TW_INLINE int64_t tw_brevll(int64_t x) {
    return (int64_t)((uint64_t)(uint32_t)tw_brev((int32_t)x) << 32 | (uint32_t)tw_brev((int32_t)(x >> 32)));
}
TW_INLINE int32_t tw_byte_perm(int32_t x, int32_t y, int32_t selector) {
    uint64_t bytes = (uint64_t)(uint32_t)y << 32 | (uint32_t)x;
    uint32_t s = (uint32_t)selector & 0x7777u;
    return (int32_t)((uint32_t)(bytes >> (s & 7) * 8 & 255) | (uint32_t)(bytes >> (s >> 4 & 7) * 8 & 255) << 8 |
                     (uint32_t)(bytes >> (s >> 8 & 7) * 8 & 255) << 16 | (uint32_t)(bytes >> (s >> 12) * 8 & 255) << 24);
}
TW_INLINE int32_t tw_mul24(int32_t a, int32_t b) {
    int32_t x = (int32_t)((uint32_t)a << 8) >> 8, y = (int32_t)((uint32_t)b << 8) >> 8;
    return (int32_t)((uint32_t)x * (uint32_t)y);
}
TW_INLINE int32_t tw_umul24(int32_t a, int32_t b) {
    return (int32_t)(((uint32_t)a & 0xffffffu) * ((uint32_t)b & 0xffffffu));
}
TW_INLINE int32_t tw_sad(int32_t a, int32_t b, int32_t c) {
    uint32_t difference = a > b ? (uint32_t)a - (uint32_t)b : (uint32_t)b - (uint32_t)a;
    return (int32_t)(difference + (uint32_t)c);
}
TW_INLINE int32_t tw_usad(int32_t a, int32_t b, int32_t c) {
    uint32_t x = (uint32_t)a, y = (uint32_t)b;
    return (int32_t)((x > y ? x - y : y - x) + (uint32_t)c);
}
TW_INLINE int32_t tw_hadd(int32_t a, int32_t b) { return (int32_t)(((int64_t)a + b) >> 1); }
TW_INLINE int32_t tw_rhadd(int32_t a, int32_t b) { return (int32_t)(((int64_t)a + b + 1) >> 1); }
TW_INLINE int32_t tw_uhadd(int32_t a, int32_t b) { return (int32_t)(((uint64_t)(uint32_t)a + (uint32_t)b) >> 1); }
TW_INLINE int32_t tw_urhadd(int32_t a, int32_t b) { return (int32_t)(((uint64_t)(uint32_t)a + (uint32_t)b + 1) >> 1); }

/* Exponents. */
TW_INLINE int32_t tw_ilogb(double x) {
    bool small = fabs(x) < 0x1p-1022;
    int32_t exponent = (int32_t)(tw_double_bits(x * (small ? 0x1p54 : 1)) >> 52 & 0x7ff) - (small ? 1077 : 1023);
    exponent = x == 0 ? INT32_MIN : exponent;
    exponent = fabs(x) == INFINITY ? INT32_MAX : exponent;
    return x != x ? INT32_MIN : exponent;
}
TW_INLINE int32_t tw_ilogbf(float x) { return tw_ilogb((double)x); }
TW_INLINE float tw_ldexpf(float x, int32_t n) {
    int32_t exponent = n < -400 ? -400 : n > 400 ? 400 : n;
    return (float)((double)x * tw_bits_double((int64_t)(exponent + 1023) << 52));
}
TW_INLINE double tw_powi(double x, int32_t n) { return pow(x, (double)n); }
TW_INLINE float tw_powif(float x, int32_t n) { return (float)pow((double)x, (double)n); }
TW_INLINE float tw_fast_fdividef(float a, float b) { return a / b; }

/* Functions, computed in a wider type than the result's: `wide`, whose functions end in w. */
#define TW_HALVES_OF_TURNS(type, suffix, wide, w)                                                              \
    TW_INLINE type tw_sinpi##suffix(type x) {                                                                  \
        type turn = x - 2 * rint##suffix(x / 2), half = rint##suffix(2 * turn);                                \
        wide rest = ((wide)turn - (wide)half / 2) * (wide)3.14159265358979323846264338327950288L;              \
        wide y = (int)half & 1 ? cos##w(rest) : sin##w(rest);                                                  \
        y = (int)half & 2 ? -y : y;                                                                            \
        return y == 0 ? copysign##suffix(0, x) : (type)y;                                                      \
    }                                                                                                          \
    TW_INLINE type tw_cospi##suffix(type x) {                                                                  \
        type turn = x - 2 * rint##suffix(x / 2), half = rint##suffix(2 * turn);                                \
        wide rest = ((wide)turn - (wide)half / 2) * (wide)3.14159265358979323846264338327950288L;              \
        wide y = (int)half & 1 ? -sin##w(rest) : cos##w(rest);                                                 \
        return (type)(((int)half & 2 ? -y : y) + 0);                                                           \
    }
#define TW_NORMS(type, suffix, wide, w)                                                                        \
    TW_INLINE type tw_norm4d##suffix(type a, type b, type c, type d) {                                         \
        wide sum = (wide)a * a + (wide)b * b + (wide)c * c + (wide)d * d;                                      \
        bool infinite = tw_isinf##suffix(a) | tw_isinf##suffix(b) | tw_isinf##suffix(c) | tw_isinf##suffix(d); \
        return infinite ? INFINITY : (type)sqrt##w(sum);                                                       \
    }                                                                                                          \
    TW_INLINE type tw_rnorm4d##suffix(type a, type b, type c, type d) {                                        \
        wide sum = (wide)a * a + (wide)b * b + (wide)c * c + (wide)d * d;                                      \
        bool infinite = tw_isinf##suffix(a) | tw_isinf##suffix(b) | tw_isinf##suffix(c) | tw_isinf##suffix(d); \
        return infinite ? 0 : (type)(1 / sqrt##w(sum));                                                        \
    }                                                                                                          \
    TW_INLINE type tw_norm3d##suffix(type a, type b, type c) { return tw_norm4d##suffix(a, b, c, 0); }         \
    TW_INLINE type tw_rnorm3d##suffix(type a, type b, type c) { return tw_rnorm4d##suffix(a, b, c, 0); }       \
    TW_INLINE type tw_rhypot##suffix(type a, type b) { return (type)(1 / hypot##w((wide)a, (wide)b)); }
#define TW_ERROR_FUNCTIONS(type, suffix, wide, w)                                                              \
    /* The y of erf(y) = p and erfc(|y|) = q = 1 - |p|, of which the smaller one is exact: Halley's steps from the series \
     * of erf's inverse, or Newton's on the logarithm from Winitzki's approximation. */                        \
    static __attribute__((unused)) type tw_inverse_error##suffix(wide p, wide q, wide factor) {                \
        const wide slope = (wide)1.12837916709551257389615890312154517L; /* 2 / sqrt(pi) */                    \
        if (!(q > 0) || p == 0) return q == 0 ? (type)(p * factor) * INFINITY : p == 0 ? (type)(p * factor) : (type)NAN; \
        if (fabs##w(p) <= (wide)0.5) {                                                                         \
            wide s = p * p, y = p * (0.8862269f + s * (0.2320137f + s * (0.1275562f + s * 0.0865521f)));       \
            for (int i = 0; i < 3; i++) {                                                                      \
                wide d = (erf##w(y) - p) / (slope * exp##w(-y * y));                                           \
                y -= d / (1 + y * d);                                                                          \
            }                                                                                                  \
            return (type)(y * factor);                                                                         \
        }                                                                                                      \
        wide log_q = log##w(q), a = log##w(q * (2 - q)), b = a / 2 + 4.33f;                                    \
        wide y = sqrt##w(sqrt##w(b * b - a / 0.147f) - b);                                                     \
        for (int i = 0; i < 4; i++) {                                                                          \
            wide tail = erfc##w(y);                                                                            \
            y += (log##w(tail) - log_q) * tail / (slope * exp##w(-y * y));                                     \
        }                                                                                                      \
        return (type)(copysign##w(y, p) * factor);                                                             \
    }                                                                                                          \
    TW_INLINE type tw_erfinv##suffix(type x) {                                                                 \
        return tw_inverse_error##suffix((wide)x, 1 - fabs##w((wide)x), 1);                                     \
    }                                                                                                          \
    TW_INLINE type tw_erfcinv##suffix(type x) {                                                                \
        return tw_inverse_error##suffix(1 - (wide)x, x < 1 ? (wide)x : 2 - (wide)x, 1);                        \
    }                                                                                                          \
    TW_INLINE type tw_normcdfinv##suffix(type x) {                                                             \
        wide p = 2 * (wide)x;                                                                                  \
        return tw_inverse_error##suffix(p - 1, p < 1 ? p : 2 - p, (wide)1.41421356237309504880168872420969808L); \
    }                                                                                                          \
    TW_INLINE type tw_normcdf##suffix(type x) {                                                                \
        return (type)((wide)0.5 * erfc##w(-x * (wide)0.707106781186547524400844362104849039L));                \
    }                                                                                                          \
    TW_INLINE type tw_erfcx##suffix(type x) {                                                                  \
        wide y = x, s = y * y;                                                                                 \
        if (!(y > (sizeof(type) == 4 ? 9 : 25))) return (type)(exp##w(s) * erfc##w(y));                        \
        wide term = 1, sum = 1;                                                                                \
        for (int k = 1; k < 10; k++) {                                                                         \
            term *= -(2 * k - 1) / (2 * s);                                                                    \
            sum += term;                                                                                       \
        }                                                                                                      \
        return (type)(sum / (y * (wide)1.77245385090551602729816748334114518L));                               \
    }
/* The modified Bessel functions of order 0 and 1: the series, and the asymptotic one for large arguments. */
#define TW_MODIFIED_BESSEL(name, order, type, wide, w)                                                         \
    static __attribute__((unused)) type name(type x) {                                                         \
        wide y = fabs##w((wide)x), sum = 1, term = 1;                                                          \
        if (!(y >= 20)) {                                                                                      \
            for (int k = 1; k <= 42; k++) {                                                                    \
                term *= y * y / (wide)(4 * k * (k + order));                                                   \
                sum += term;                                                                                   \
            }                                                                                                  \
            return (type)(order ? sum * x / 2 : sum);                                                          \
        }                                                                                                      \
        for (int k = 1; k <= 32; k++) {                                                                        \
            term *= (wide)((2 * k - 1) * (2 * k - 1) - 4 * order) / (8 * k * y);                               \
            sum += term;                                                                                       \
        }                                                                                                      \
        wide found = y < INFINITY ? sum * exp##w(y) / sqrt##w(y * (wide)6.28318530717958647692528676655900577L) : y; \
        return (type)(order ? copysign##w(found, x) : found);                                                  \
    }
#define TW_WIDER(type, suffix, wide, w)                                                                        \
    TW_HALVES_OF_TURNS(type, suffix, wide, w)                                                                  \
    TW_NORMS(type, suffix, wide, w)                                                                            \
    TW_ERROR_FUNCTIONS(type, suffix, wide, w)                                                                  \
    TW_MODIFIED_BESSEL(tw_cyl_bessel_i0##suffix, 0, type, wide, w)                                             \
    TW_MODIFIED_BESSEL(tw_cyl_bessel_i1##suffix, 1, type, wide, w)                                             \
    TW_INLINE type tw_lgamma##suffix(type x) { return (type)lgamma##w((wide)x); }
TW_WIDER(float, f, double, )
TW_WIDER(double, , long double, l)
#ifdef __GLIBC__
#define TW_WIDE_BESSEL(name) name##l
#else
#define TW_WIDE_BESSEL(name) name
#endif
#define TW_BESSEL(kind)                                                                                        \
    TW_INLINE float tw_##kind##0f(float x) { return (float)kind##0((double)x); }                               \
    TW_INLINE float tw_##kind##1f(float x) { return (float)kind##1((double)x); }                               \
    TW_INLINE float tw_##kind##nf(int32_t n, float x) { return n < 0 ? NAN : (float)kind##n(n, (double)x); }   \
    TW_INLINE double tw_##kind##0(double x) { return (double)TW_WIDE_BESSEL(kind##0)(x); }                     \
    TW_INLINE double tw_##kind##1(double x) { return (double)TW_WIDE_BESSEL(kind##1)(x); }                     \
    TW_INLINE double tw_##kind##n(int32_t n, double x) { return n < 0 ? NAN : (double)TW_WIDE_BESSEL(kind##n)(n, x); }
TW_BESSEL(j)
TW_BESSEL(y)

/* What every native kernel includes: number formats, integer arithmetic that wraps, functions, tile products, messages.
 *
 * Small floats (fp16, bf16, fp8) live in registers and local memory as fp32 that holds a value of theirs; the functions
 * tw_round_* make one, tw_*_bits and tw_bits_* turn it into what lies in memory and back, NaN with its payload. Conversions round to nearest
 * even; those to fp8 saturate, infinities included, as GPUs do. Everything is free of branches, so that compilers
 * vectorise it.
 */
#include <math.h>
#include <omp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TW_INLINE static inline __attribute__((always_inline, unused))

/* Bits */

TW_INLINE int32_t tw_float_bits(float x) { int32_t u; memcpy(&u, &x, 4); return u; }
TW_INLINE float tw_bits_float(int32_t u) { float x; memcpy(&x, &u, 4); return x; }
TW_INLINE int64_t tw_double_bits(double x) { int64_t u; memcpy(&u, &x, 8); return u; }
TW_INLINE double tw_bits_double(int64_t u) { double x; memcpy(&x, &u, 8); return x; }

TW_INLINE int16_t tw_bf16_bits(float x) { return (int16_t)((uint32_t)tw_float_bits(x) >> 16); }
TW_INLINE float tw_bits_bf16(int16_t h) { return tw_bits_float((int32_t)((uint32_t)(uint16_t)h << 16)); }

TW_INLINE float tw_round_bf16(float x) {
    uint32_t u = (uint32_t)tw_float_bits(x);
    uint32_t nan = u | 0x400000u, rounded = u + 0x7fffu + ((u >> 16) & 1u);
    u = x != x ? nan : rounded;
    return tw_bits_float((int32_t)(u & 0xffff0000u));
}

TW_INLINE int16_t tw_f16_bits(float x) {
    uint32_t u = (uint32_t)tw_float_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    /* Below 2^-14 the addition of 0.5 rounds to multiples of 2^-24. */
    uint32_t small = (uint32_t)tw_float_bits(tw_bits_float((int32_t)a) + 0.5f) - 0x3f000000u;
    uint32_t nan = 0x7c00u | ((a >> 13) & 0x3ffu) | ((uint32_t)(((a >> 13) & 0x3ffu) == 0u) << 9);
    uint32_t h = a < 0x38800000u ? small : normal;
    h = a >= 0x47800000u ? 0x7c00u : h;
    h = a > 0x7f800000u ? nan : h;
    return (int16_t)(h | sign);
}

TW_INLINE float tw_bits_f16(int16_t h) {
    uint32_t sign = ((uint32_t)(uint16_t)h & 0x8000u) << 16, a = ((uint32_t)(uint16_t)h & 0x7fffu) << 13;
    uint32_t finite = (uint32_t)tw_float_bits(tw_bits_float((int32_t)a) * 0x1p112f);
    uint32_t special = a | 0x7f800000u;
    return tw_bits_float((int32_t)((a >= 0x0f800000u ? special : finite) | sign));
}

TW_INLINE float tw_round_f16(float x) { return tw_bits_f16(tw_f16_bits(x)); }

TW_INLINE int8_t tw_e5m2_bits(float x) {
    uint32_t u = (uint32_t)tw_float_bits(x), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
    uint32_t normal = (a - 0x38000000u + 0xfffffu + ((a >> 21) & 1u)) >> 21;
    uint32_t small = (uint32_t)tw_float_bits(tw_bits_float((int32_t)a) + 128.0f) - 0x43000000u;
    uint32_t nan = 0x7cu | ((a >> 21) & 3u) | (uint32_t)(((a >> 21) & 3u) == 0u);
    uint32_t b = a < 0x38800000u ? small : normal;
    b = b > 0x7cu ? 0x7cu : b;
    b = a > 0x7f800000u ? nan : b;
    return (int8_t)(b | sign);
}

TW_INLINE float tw_bits_e5m2(int8_t b) { return tw_bits_f16((int16_t)((uint16_t)(uint8_t)b << 8)); }
TW_INLINE float tw_round_e5m2(float x) {
    float clamped = x > 57344.0f ? 57344.0f : x;
    clamped = clamped < -57344.0f ? -57344.0f : clamped;
    return tw_bits_e5m2(tw_e5m2_bits(clamped));
}

TW_INLINE int8_t tw_e4m3_bits(float x) {
    uint32_t u = (uint32_t)tw_float_bits(x), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
    uint32_t normal = (a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
    uint32_t small = (uint32_t)tw_float_bits(tw_bits_float((int32_t)a) + 16384.0f) - 0x46800000u;
    uint32_t b = a < 0x3c800000u ? small : normal;
    b = b > 0x7eu ? 0x7eu : b;
    b = a > 0x7f800000u ? 0x7fu : b;
    return (int8_t)(b | sign);
}

TW_INLINE float tw_bits_e4m3(int8_t b) {
    uint32_t sign = ((uint32_t)(uint8_t)b & 0x80u) << 24, a = (uint32_t)(uint8_t)b & 0x7fu;
    uint32_t finite = (uint32_t)tw_float_bits(tw_bits_float((int32_t)(a << 20)) * 0x1p120f);
    return tw_bits_float((int32_t)((a == 0x7fu ? 0x7fc00000u : finite) | sign));
}
TW_INLINE float tw_round_e4m3(float x) { return tw_bits_e4m3(tw_e4m3_bits(x)); }

/* The scales and the 4-bit elements of microscaling formats: powers of two, and the half of a byte that is asked for. */
TW_INLINE float tw_bits_e8m0(int8_t b) {
    uint32_t exponent = (uint8_t)b;
    uint32_t u = exponent == 0 ? 0x400000u : exponent == 255 ? 0x7fc00000u : exponent << 23;
    return tw_bits_float((int32_t)u);
}
TW_INLINE float tw_bits_e2m1(int8_t byte, int32_t upper) {
    uint32_t b = ((uint32_t)(uint8_t)byte >> (upper ? 4 : 0)) & 0xfu, sign = (b & 8u) << 28, a = b & 7u;
    /* Exponent and mantissa take the top of fp32's; the factor moves the exponent, and makes 0.5 of the number below 1. */
    uint32_t u = (uint32_t)tw_float_bits(tw_bits_float((int32_t)(a << 22)) * 0x1p126f);
    return tw_bits_float((int32_t)(u | sign));
}

/* Towards zero: one step back where rounding to nearest went up. Infinity stays, where the format has it. */
#define TW_TOWARDS_ZERO(name, bits_type)                                                                       \
    TW_INLINE float tw_rtz_##name(float x) {                                                                   \
        bits_type b = tw_##name##_bits(x);                                                                     \
        bool up = fabsf(tw_bits_##name(b)) > fabsf(x);                                                         \
        bits_type down = (bits_type)(b - 1);                                                                   \
        return tw_bits_##name(up ? down : b);                                                                  \
    }
TW_TOWARDS_ZERO(f16, int16_t)
TW_TOWARDS_ZERO(e5m2, int8_t)
TW_TOWARDS_ZERO(e4m3, int8_t)
TW_INLINE float tw_rtz_bf16(float x) {
    uint32_t u = (uint32_t)tw_float_bits(x);
    return tw_bits_float((int32_t)((x != x ? u | 0x400000u : u) & 0xffff0000u));
}
TW_INLINE float tw_rtz_f32(double x) {
    float f = (float)x;
    return fabs((double)f) > fabs(x) ? tw_bits_float(tw_float_bits(f) - 1) : f;
}

/* The fp32 neighbour towards zero, its last bit set if anything was cut off: rounding that to a format with at least two
 * bits less gives what rounding the number itself gives. */
TW_INLINE float tw_odd_double(double x) {
    float f = (float)x;
    if (x != x || (double)f == x) return f;
    int32_t u = tw_float_bits(f);
    if (fabs((double)f) > fabs(x)) u -= 1;
    return tw_bits_float(u | 1);
}
/* x y + z, inexact sums made odd likewise, for operands whose product is exact in fp64. */
TW_INLINE double tw_odd_fma(float x, float y, float z) {
    double product = (double)x * (double)y, sum = product + (double)z;
    double part = sum - product, lost = (product - (sum - part)) + ((double)z - part);
    int64_t u = tw_double_bits(sum);
    bool step = (lost != 0) & (fabs(sum) < INFINITY) & ((u & 1) == 0);
    return tw_bits_double(u + (step ? ((lost > 0) == (sum > 0) ? 1 : -1) : 0));
}
TW_INLINE float tw_odd_unsigned(uint64_t x) {
    if (x < (1u << 24)) return (float)x;
    int shift = 40 - __builtin_clzll(x);
    uint64_t kept = x >> shift;
    kept |= (kept << shift) != x;
    return ldexpf((float)kept, shift);
}
TW_INLINE float tw_odd_signed(int64_t x) {
    return x < 0 ? -tw_odd_unsigned(0 - (uint64_t)x) : tw_odd_unsigned((uint64_t)x);
}

/* Integers: division by zero and the one quotient that overflows are defined, as on GPUs they do not trap. */
#define TW_INTEGERS(bits)                                                                                      \
    TW_INLINE int##bits##_t tw_divs##bits(int##bits##_t a, int##bits##_t b) {                                  \
        if (b == 0) return -1;                                                                                 \
        if (b == -1) return (int##bits##_t)(0 - (uint##bits##_t)a);                                            \
        return (int##bits##_t)(a / b);                                                                         \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_rems##bits(int##bits##_t a, int##bits##_t b) {                                  \
        return b == 0 ? a : b == -1 ? 0 : (int##bits##_t)(a % b);                                              \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_divu##bits(int##bits##_t a, int##bits##_t b) {                                  \
        return b == 0 ? -1 : (int##bits##_t)((uint##bits##_t)a / (uint##bits##_t)b);                           \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_remu##bits(int##bits##_t a, int##bits##_t b) {                                  \
        return b == 0 ? a : (int##bits##_t)((uint##bits##_t)a % (uint##bits##_t)b);                            \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_shl##bits(int##bits##_t a, int##bits##_t b) {                                   \
        int##bits##_t r = (int##bits##_t)((uint##bits##_t)a << ((uint##bits##_t)b & (bits - 1)));              \
        return (uint##bits##_t)b >= bits ? 0 : r;                                                              \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_shru##bits(int##bits##_t a, int##bits##_t b) {                                  \
        int##bits##_t r = (int##bits##_t)((uint##bits##_t)a >> ((uint##bits##_t)b & (bits - 1)));              \
        return (uint##bits##_t)b >= bits ? 0 : r;                                                              \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_shrs##bits(int##bits##_t a, int##bits##_t b) {                                  \
        return (int##bits##_t)(a >> ((uint##bits##_t)b >= bits ? bits - 1 : b));                               \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_abs##bits(int##bits##_t a) {                                                    \
        return (int##bits##_t)(a < 0 ? 0 - (uint##bits##_t)a : (uint##bits##_t)a);                             \
    }
TW_INTEGERS(8)
TW_INTEGERS(16)
TW_INTEGERS(32)
TW_INTEGERS(64)

TW_INLINE int8_t tw_mulhu8(int8_t a, int8_t b) { return (int8_t)(((uint8_t)a * (uint8_t)b) >> 8); }
TW_INLINE int16_t tw_mulhu16(int16_t a, int16_t b) { return (int16_t)(((uint32_t)(uint16_t)a * (uint16_t)b) >> 16); }
TW_INLINE int32_t tw_mulhu32(int32_t a, int32_t b) { return (int32_t)(((uint64_t)(uint32_t)a * (uint32_t)b) >> 32); }
TW_INLINE int64_t tw_mulhu64(int64_t a, int64_t b) {
    return (int64_t)(((unsigned __int128)(uint64_t)a * (uint64_t)b) >> 64);
}
TW_INLINE int32_t tw_mulhs32(int32_t a, int32_t b) { return (int32_t)(((int64_t)a * b) >> 32); }
TW_INLINE int64_t tw_mulhs64(int64_t a, int64_t b) { return (int64_t)(((__int128)a * b) >> 64); }
TW_INLINE int32_t tw_popc32(int32_t a) { return __builtin_popcount((uint32_t)a); }
TW_INLINE int32_t tw_popc64(int64_t a) { return __builtin_popcountll((uint64_t)a); }
TW_INLINE int32_t tw_clz32(int32_t a) { return a == 0 ? 32 : __builtin_clz((uint32_t)a); }
TW_INLINE int32_t tw_clz64(int64_t a) { return a == 0 ? 64 : __builtin_clzll((uint64_t)a); }
TW_INLINE int32_t tw_ffs32(int32_t a) { return __builtin_ffs(a); }
TW_INLINE int32_t tw_ffs64(int64_t a) { return __builtin_ffsll(a); }

/* Floats. maxnum and minnum pass over NaN, maximum and minimum keep it. */
#define TW_FLOATS(type, suffix)                                                                                \
    TW_INLINE type tw_maxnum##suffix(type a, type b) { type m = a > b ? a : b; return b != b ? a : m; }        \
    TW_INLINE type tw_minnum##suffix(type a, type b) { type m = a < b ? a : b; return b != b ? a : m; }        \
    TW_INLINE type tw_maximum##suffix(type a, type b) { type m = a > b ? a : b; return a != a ? a : m; }       \
    TW_INLINE type tw_minimum##suffix(type a, type b) { type m = a < b ? a : b; return a != a ? a : m; }       \
    TW_INLINE type tw_rsqrt##suffix(type a) { return 1 / sqrt##suffix(a); }                                    \
    TW_INLINE type tw_cbrt##suffix(type a) { return (type)cbrtl(a); }                                          \
    TW_INLINE type tw_log10##suffix(type a) { return (type)log10l(a); }                                        \
    TW_INLINE type tw_rcbrt##suffix(type a) { return (type)(1 / cbrtl(a)); }                                   \
    TW_INLINE type tw_exp10##suffix(type a) { return pow##suffix(10, a); }                                     \
    TW_INLINE int32_t tw_isnan##suffix(type a) { return a != a; }                                              \
    TW_INLINE int32_t tw_isinf##suffix(type a) { return fabs##suffix(a) == INFINITY; }                         \
    TW_INLINE int32_t tw_isfinite##suffix(type a) { return fabs##suffix(a) < INFINITY; }                       \
    TW_INLINE int32_t tw_signbit##suffix(type a) { return signbit(a) != 0; }
TW_FLOATS(float, f)
TW_FLOATS(double, )
TW_INLINE float tw_saturatef(float a) { float m = a > 0 ? a : 0; return m < 1 ? m : 1; }

/* exp(r) for |r| <= ln 2 / 2, where the series up to r^7 / 7! is within 2^-27. */
TW_INLINE float tw_small_exp(float r) {
    float p = 0x1.a01a02p-13f;
    p = __builtin_fmaf(p, r, 0x1.6c16c2p-10f);
    p = __builtin_fmaf(p, r, 0x1.111112p-7f);
    p = __builtin_fmaf(p, r, 0x1.555556p-5f);
    p = __builtin_fmaf(p, r, 0x1.555556p-3f);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p, r, 1.0f);
    return __builtin_fmaf(p, r, 1.0f);
}
/* x between two bounds of either sign, by their bits: two instructions, where comparisons of floats would be many more
 * for the sake of NaN, which is left to the caller. */
TW_INLINE float tw_clip(float x, uint32_t low, int32_t high) {
    uint32_t u = (uint32_t)tw_float_bits(x);
    u = u < low ? u : low;
    int32_t v = (int32_t)u;
    return tw_bits_float(v < high ? v : high);
}
/* Added to a small float, this leaves the nearest integer, and the exponent of that power of 2, in the low bits. The power
 * is applied in two halves, so that results below the normal range are rounded once. */
#define TW_POWER (0x1.8p23f + 127.0f)
TW_INLINE float tw_power(float power) { return tw_bits_float((int32_t)((uint32_t)tw_float_bits(power) << 23)); }
TW_INLINE float tw_expf(float x) {
    float c = tw_clip(x, 0xc2d00000u, 0x42b20000); /* -104 and 89 */
    float half = __builtin_fmaf(c, 0x1.715476p-1f, TW_POWER), h = half - TW_POWER;
    float rest = __builtin_fmaf(c, 0x1.715476p0f, TW_POWER - h), n = h + (rest - TW_POWER);
    float r = __builtin_fmaf(n, -0x1.62e4p-1f, c);
    r = __builtin_fmaf(n, -0x1.7f7d1cp-20f, r);
    float y = tw_small_exp(r) * tw_power(half) * tw_power(rest);
    return x != x ? x : y;
}
TW_INLINE float tw_exp2f(float x) {
    float c = tw_clip(x, 0xc3170000u, 0x43010000); /* -151 and 129 */
    float half = __builtin_fmaf(c, 0.5f, TW_POWER), d = c - (half - TW_POWER);
    float rest = d + TW_POWER;
    float y = tw_small_exp((d - (rest - TW_POWER)) * 0x1.62e43p-1f) * tw_power(half) * tw_power(rest);
    return x != x ? x : y;
}

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

/* to[j][i] = from[i][j]; rows and columns are multiples of 16. Four rounds of exchanges between pairs of vectors. */
typedef int32_t tw_i32x16 __attribute__((vector_size(64), aligned(4), may_alias));
#define TW_EXCHANGE(step, low, high)                                                                           \
    for (int i = 0; i < 16; i++)                                                                               \
        if (!(i & step)) {                                                                                     \
            tw_i32x16 a = v[i], b = v[i + step];                                                               \
            v[i] = TW_PICK(a, b, low);                                                                         \
            v[i + step] = TW_PICK(a, b, high);                                                                 \
        }
#ifdef __clang__
#define TW_PICK(a, b, index) __builtin_shufflevector(a, b, TW_UNPACK index)
#else
#define TW_PICK(a, b, index) __builtin_shuffle(a, b, (tw_i32x16){TW_UNPACK index})
#endif
#define TW_UNPACK(...) __VA_ARGS__
TW_INLINE void tw_transpose_block(const int32_t *from, int32_t *to, int from_stride, int to_stride) {
    tw_i32x16 v[16];
    for (int i = 0; i < 16; i++) v[i] = *(const tw_i32x16 *)(from + i * from_stride);
    TW_EXCHANGE(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    TW_EXCHANGE(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    TW_EXCHANGE(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    TW_EXCHANGE(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    for (int i = 0; i < 16; i++) *(tw_i32x16 *)(to + i * to_stride) = v[i];
}
static void __attribute__((unused)) tw_transpose(const int32_t *from, int32_t *to, int rows, int columns) {
    for (int i = 0; i < rows; i += 16)
        for (int j = 0; j < columns; j += 16)
            tw_transpose_block(from + i * columns + j, to + j * rows + i, columns, rows);
}

/* Products of row-major tiles: c = a b, or c += a b. Sizes are constants, powers of two. */
typedef float tw_f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float tw_f32x8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float tw_f32x4 __attribute__((vector_size(16), aligned(4), may_alias));

#define TW_BLOCK(name, vector, lanes, rows, columns)                                                           \
    TW_INLINE void name(const float *a, const float *b, float *c, int n, int k, bool add) {                    \
        vector acc[rows][columns];                                                                             \
        for (int r = 0; r < rows; r++)                                                                         \
            for (int j = 0; j < columns; j++)                                                                  \
                acc[r][j] = add ? *(const vector *)(c + r * n + j * lanes) : (vector){0};                      \
        for (int p = 0; p < k; p++) {                                                                          \
            vector row[columns];                                                                               \
            for (int j = 0; j < columns; j++) row[j] = *(const vector *)(b + p * n + j * lanes);               \
            for (int r = 0; r < rows; r++) {                                                                   \
                for (int j = 0; j < columns; j++) acc[r][j] += a[r * k + p] * row[j];                          \
            }                                                                                                  \
        }                                                                                                      \
        for (int r = 0; r < rows; r++)                                                                         \
            for (int j = 0; j < columns; j++) *(vector *)(c + r * n + j * lanes) = acc[r][j];                  \
    }
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
TW_BLOCK(tw_block_8x32, tw_f32x16, 16, 8, 2)
TW_BLOCK(tw_block_1x32, tw_f32x16, 16, 1, 2)
TW_BLOCK(tw_block_8x16, tw_f32x16, 16, 8, 1)
TW_BLOCK(tw_block_1x16, tw_f32x16, 16, 1, 1)
TW_BLOCK(tw_block_4x8, tw_f32x8, 8, 4, 1)
TW_BLOCK(tw_block_1x8, tw_f32x8, 8, 1, 1)
TW_BLOCK(tw_block_4x4, tw_f32x4, 4, 4, 1)
TW_BLOCK(tw_block_1x4, tw_f32x4, 4, 1, 1)
#pragma GCC pop_options

#define TW_TILES(rows, columns)                                                                                \
    for (int j = 0; j < n; j += columns)                                                                       \
        for (int i = 0; i < m; i += rows)                                                                      \
            tw_block_##rows##x##columns(a + i * k, b + j, c + i * n + j, n, k, add)

TW_INLINE void tw_dot_f32(const float *a, const float *b, float *c, int m, int n, int k, bool add) {
    if (n >= 32 && m >= 8) { TW_TILES(8, 32); }
    else if (n >= 32) { TW_TILES(1, 32); }
    else if (n == 16 && m >= 8) { TW_TILES(8, 16); }
    else if (n == 16) { TW_TILES(1, 16); }
    else if (n == 8 && m >= 4) { TW_TILES(4, 8); }
    else if (n == 8) { TW_TILES(1, 8); }
    else if (n == 4 && m >= 4) { TW_TILES(4, 4); }
    else if (n == 4) { TW_TILES(1, 4); }
    else {
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                float sum = add ? c[i * n + j] : 0.0f;
                for (int p = 0; p < k; p++) sum = __builtin_fmaf(a[i * k + p], b[p * n + j], sum);
                c[i * n + j] = sum;
            }
    }
}

#define TW_PLAIN_DOT(name, in, out)                                                                            \
    TW_INLINE void name(const in *a, const in *b, out *c, int m, int n, int k, bool add) {                     \
        for (int i = 0; i < m; i++) {                                                                          \
            if (!add)                                                                                          \
                for (int j = 0; j < n; j++) c[i * n + j] = 0;                                                  \
            for (int p = 0; p < k; p++)                                                                        \
                _Pragma("omp simd")                                                                            \
                for (int j = 0; j < n; j++) c[i * n + j] += (out)((out)a[i * k + p] * (out)b[p * n + j]);      \
        }                                                                                                      \
    }
TW_PLAIN_DOT(tw_dot_f64, double, double)
TW_PLAIN_DOT(tw_dot_i8, int8_t, uint32_t)
TW_PLAIN_DOT(tw_dot_i32, uint32_t, uint32_t)

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define TW_HAS_PAIRS 1

/* Two bf16 numbers that follow each other along k in one 32-bit word. The instruction takes numbers below the normal
 * range for zero, so tiles that hold any are left to tw_dot_f32: the result says whether there are any. */
TW_INLINE bool tw_pack_rows(const float *a, uint32_t *packed, int m, int k) {
    uint32_t small = 0;
    for (int i = 0; i < m; i++)
        _Pragma("omp simd reduction(|:small)")
        for (int p = 0; p < k / 2; p++) {
            uint32_t low = (uint32_t)tw_float_bits(a[i * k + 2 * p]), high = (uint32_t)tw_float_bits(a[i * k + 2 * p + 1]);
            small |= (uint32_t)((low & 0x7fffffffu) - 1u < 0x7fffffu) | (uint32_t)((high & 0x7fffffffu) - 1u < 0x7fffffu);
            packed[i * (k / 2) + p] = (low >> 16) | (high & 0xffff0000u);
        }
    return small != 0;
}
TW_INLINE bool tw_pack_columns(const float *b, uint32_t *packed, int n, int k) {
    uint32_t small = 0;
    for (int p = 0; p < k / 2; p++)
        _Pragma("omp simd reduction(|:small)")
        for (int j = 0; j < n; j++) {
            uint32_t low = (uint32_t)tw_float_bits(b[2 * p * n + j]), high = (uint32_t)tw_float_bits(b[(2 * p + 1) * n + j]);
            small |= (uint32_t)((low & 0x7fffffffu) - 1u < 0x7fffffu) | (uint32_t)((high & 0x7fffffffu) - 1u < 0x7fffffu);
            packed[p * n + j] = (low >> 16) | (high & 0xffff0000u);
        }
    return small != 0;
}
/* acc += a[2p] b[2p] + a[2p + 1] b[2p + 1] per lane. As text, since the header with its name takes compilers longer to
 * read than all the rest. */
TW_INLINE tw_f32x16 tw_dot_step(tw_f32x16 acc, tw_i32x16 a, tw_i32x16 b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
TW_INLINE void tw_pairs_block(const uint32_t *a, const uint32_t *b, float *c, int n, int k, bool add) {
    tw_f32x16 acc[8][2];
    for (int r = 0; r < 8; r++)
        for (int j = 0; j < 2; j++) acc[r][j] = add ? *(const tw_f32x16 *)(c + r * n + j * 16) : (tw_f32x16){0};
    for (int p = 0; p < k / 2; p++) {
        tw_i32x16 row[2];
        for (int j = 0; j < 2; j++) row[j] = *(const tw_i32x16 *)(b + p * n + j * 16);
        for (int r = 0; r < 8; r++) {
            tw_i32x16 both = (int32_t)a[r * (k / 2) + p] - (tw_i32x16){0};
            for (int j = 0; j < 2; j++) acc[r][j] = tw_dot_step(acc[r][j], both, row[j]);
        }
    }
    for (int r = 0; r < 8; r++)
        for (int j = 0; j < 2; j++) *(tw_f32x16 *)(c + r * n + j * 16) = acc[r][j];
}
TW_INLINE void tw_dot_pairs(
    const float *a, const float *b, float *c, uint32_t *a_packed, uint32_t *b_packed, int m, int n, int k, bool add) {
    bool small = tw_pack_rows(a, a_packed, m, k);
    if (tw_pack_columns(b, b_packed, n, k) || small) {
        tw_dot_f32(a, b, c, m, n, k, add);
        return;
    }
    for (int j = 0; j < n; j += 32)
        for (int i = 0; i < m; i += 8)
            tw_pairs_block(a_packed + i * (k / 2), b_packed + j, c + i * n + j, n, k, add);
}
#endif

/* What a launch reports back. */
typedef struct {
    int32_t kind;     /* 0: nothing, 1: an assertion failed, 2: an access was out of bounds */
    int32_t site;     /* number of the place in the kernel */
    int32_t program[3];
    int32_t element;  /* position in the tile */
    int64_t address;
} tw_report;

TW_INLINE void tw_raise(tw_report *report, int kind, int site, const int32_t *program, int element, int64_t address) {
    int32_t none = 0;
    if (__atomic_compare_exchange_n(&report->kind, &none, -1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        report->site = site;
        report->program[0] = program[0];
        report->program[1] = program[1];
        report->program[2] = program[2];
        report->element = element;
        report->address = address;
        __atomic_store_n(&report->kind, kind, __ATOMIC_RELEASE);
    }
}

/* Memory that the kernel's pointers may reach: one range per pointer argument. */
typedef struct {
    int32_t n;
    const int64_t *ranges;
} tw_bounds;

TW_INLINE bool tw_within(const tw_bounds *bounds, uint64_t allowed, const void *address, int64_t size) {
    for (int r = 0; r < bounds->n; r++)
        if ((allowed >> (r & 63) & 1) && (int64_t)(intptr_t)address >= bounds->ranges[2 * r] &&
            (int64_t)(intptr_t)address + size <= bounds->ranges[2 * r + 1])
            return true;
    return false;
}

/* Atomic operations. Floats go through the integer of their size. */
#define TW_ATOMIC_INTEGERS(bits)                                                                               \
    TW_INLINE int##bits##_t tw_atomic_add_i##bits(int##bits##_t *p, int##bits##_t v) {                         \
        return (int##bits##_t)__atomic_fetch_add((uint##bits##_t *)p, (uint##bits##_t)v, __ATOMIC_ACQ_REL);    \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_atomic_and_i##bits(int##bits##_t *p, int##bits##_t v) {                         \
        return __atomic_fetch_and(p, v, __ATOMIC_ACQ_REL);                                                     \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_atomic_or_i##bits(int##bits##_t *p, int##bits##_t v) {                          \
        return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL);                                                      \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_atomic_xor_i##bits(int##bits##_t *p, int##bits##_t v) {                         \
        return __atomic_fetch_xor(p, v, __ATOMIC_ACQ_REL);                                                     \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_atomic_load_i##bits(int##bits##_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); } \
    TW_INLINE int##bits##_t tw_atomic_exchange_i##bits(int##bits##_t *p, int##bits##_t v) {                    \
        return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL);                                                    \
    }                                                                                                          \
    TW_INLINE int##bits##_t tw_atomic_compare_i##bits(int##bits##_t *p, int##bits##_t expected, int##bits##_t v) { \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);               \
        return expected;                                                                                       \
    }
TW_ATOMIC_INTEGERS(16)
TW_ATOMIC_INTEGERS(32)
TW_ATOMIC_INTEGERS(64)

/* old = *p; *p = result, where result is an expression of old and v. */
#define TW_ATOMIC_LOOP(name, stored, type, read, write, result)                                                \
    TW_INLINE stored name(stored *p, stored value) {                                                           \
        stored seen = __atomic_load_n(p, __ATOMIC_ACQUIRE);                                                    \
        const type v = read(value);                                                                            \
        for (;;) {                                                                                             \
            const type old = read(seen);                                                                       \
            stored next = write(result);                                                                       \
            if (__atomic_compare_exchange_n(p, &seen, next, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return seen; \
        }                                                                                                      \
    }
#define TW_AS_IS(x) (x)
TW_ATOMIC_LOOP(tw_atomic_max_i32, int32_t, int32_t, TW_AS_IS, TW_AS_IS, (old > v ? old : v))
TW_ATOMIC_LOOP(tw_atomic_min_i32, int32_t, int32_t, TW_AS_IS, TW_AS_IS, (old < v ? old : v))
TW_ATOMIC_LOOP(tw_atomic_max_i64, int64_t, int64_t, TW_AS_IS, TW_AS_IS, (old > v ? old : v))
TW_ATOMIC_LOOP(tw_atomic_min_i64, int64_t, int64_t, TW_AS_IS, TW_AS_IS, (old < v ? old : v))
TW_ATOMIC_LOOP(tw_atomic_umax_i32, int32_t, uint32_t, (uint32_t), (int32_t), (old > v ? old : v))
TW_ATOMIC_LOOP(tw_atomic_umin_i32, int32_t, uint32_t, (uint32_t), (int32_t), (old < v ? old : v))
TW_ATOMIC_LOOP(tw_atomic_umax_i64, int64_t, uint64_t, (uint64_t), (int64_t), (old > v ? old : v))
TW_ATOMIC_LOOP(tw_atomic_umin_i64, int64_t, uint64_t, (uint64_t), (int64_t), (old < v ? old : v))
TW_ATOMIC_LOOP(tw_atomic_add_f16, int16_t, float, tw_bits_f16, tw_f16_bits, (old + v))
TW_ATOMIC_LOOP(tw_atomic_add_bf16, int16_t, float, tw_bits_bf16, tw_bf16_bits, (tw_round_bf16(old + v)))
TW_ATOMIC_LOOP(tw_atomic_bits_add_f32, int32_t, float, tw_bits_float, tw_float_bits, (old + v))
TW_ATOMIC_LOOP(tw_atomic_bits_add_f64, int64_t, double, tw_bits_double, tw_double_bits, (old + v))
TW_INLINE float tw_atomic_add_f32(float *p, float v) {
    return tw_bits_float(tw_atomic_bits_add_f32((int32_t *)(void *)p, tw_float_bits(v)));
}
TW_INLINE double tw_atomic_add_f64(double *p, double v) {
    return tw_bits_double(tw_atomic_bits_add_f64((int64_t *)(void *)p, tw_double_bits(v)));
}

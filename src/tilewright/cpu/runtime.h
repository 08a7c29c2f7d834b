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
static void __attribute__((noinline, unused)) tw_dot_any(
    const float *a, const float *b, float *c, int m, int n, int k, bool add) {
    tw_dot_f32(a, b, c, m, n, k, add); /* seldom run, so not worth code for each size */
}
TW_INLINE void tw_dot_pairs(
    const float *a, const float *b, float *c, uint32_t *a_packed, uint32_t *b_packed, int m, int n, int k, bool add) {
    bool small = tw_pack_rows(a, a_packed, m, k);
    if (tw_pack_columns(b, b_packed, n, k) || small) {
        tw_dot_any(a, b, c, m, n, k, add);
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

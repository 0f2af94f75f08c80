// Sixteen float lanes: loads that widen, a base-2 exponential, reductions.
// GCC's vector extension, so that one source serves every instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lite_attention::LITE_ISA {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));
typedef uint32_t UVec __attribute__((vector_size(64)));
typedef uint16_t HVec __attribute__((vector_size(32)));

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

constexpr IVec kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Vec splat(float x) { return Vec{} + x; }

template <typename T>
inline T load_as(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof(T));
    return v;
}

inline Vec load(const float* p) { return load_as<Vec>(p); }

inline Vec load(const bfloat16* p) {
    const UVec wide = __builtin_convertvector(load_as<HVec>(p), UVec) << 16;
    return (Vec)wide;
}

inline IVec load(const uint16_t* p) { return __builtin_convertvector(load_as<HVec>(p), IVec); }

// n |n|
inline Vec signed_square(IVec n) {
    const Vec x = __builtin_convertvector(n, Vec);
    return x * (x < 0 ? -x : x);
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline bfloat16 narrow_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

#if defined(__F16C__)
inline float widen(float16 x) { return _cvtsh_ss(x.bits); }
inline float16 narrow_fp16(float f) { return {uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))}; }
#if defined(__AVX512F__)
inline Vec load(const float16* p) { return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)); }
#else
inline Vec load(const float16* p) {
    Vec v;
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
    std::memcpy(&v, &low, 32);
    std::memcpy((char*)&v + 32, &high, 32);
    return v;
}
#endif
#else
inline float widen(float16 x) {
    _Float16 h;
    std::memcpy(&h, &x.bits, 2);
    return float(h);
}
inline float16 narrow_fp16(float f) {
    const _Float16 h = _Float16(f);
    float16 r;
    std::memcpy(&r.bits, &h, 2);
    return r;
}
inline Vec load(const float16* p) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
    return v;
}
#endif

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void put(float* p, float x) { *p = x; }
inline void put(bfloat16* p, float x) { *p = narrow_bf16(x); }
inline void put(float16* p, float x) { *p = narrow_fp16(x); }

typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

// Four numbers whose sum is that of all lanes.
inline Quarter fold(Vec v) {
    const Half half = load_as<Half>(&v) + load_as<Half>((const char*)&v + 32);
    return load_as<Quarter>(&half) + load_as<Quarter>((const char*)&half + 16);
}

inline float sum(Vec v) {
    const Quarter quarter = fold(v);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// The sums of each four of 64 numbers.
inline Vec sum_fours(const float* p) {
    constexpr IVec kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, kOdd = kEven + 1;
    const auto pairs = [&](Vec a, Vec b) { return __builtin_shuffle(a, b, kEven) + __builtin_shuffle(a, b, kOdd); };
    const Vec low = pairs(load(p), load(p + kLanes)), high = pairs(load(p + 2 * kLanes), load(p + 3 * kLanes));
    return pairs(low, high);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline Vec sqrt(Vec v) {
    for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
    return v;
}

inline float max(Vec v) {
    float m = v[0];
    for (int i = 1; i < kLanes; ++i) m = m > v[i] ? m : v[i];
    return m;
}

// 2**x for x <= 0, relative error below 2e-7; -inf gives 0.
inline Vec exp2(Vec x) {
    const IVec tiny = x < -126.0f;
    x = tiny ? splat(-126.0f) : x;
    const Vec magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
    const Vec rounded = x + magic;
    const IVec whole = (IVec)rounded - (IVec)magic;
    const Vec f = x - (rounded - magic);  // in [-0.5, 0.5]
    Vec y = splat(1.5403530393381606e-4f);
    y = y * f + 1.3333558146428443e-3f;
    y = y * f + 9.618129107628477e-3f;
    y = y * f + 5.550410866482158e-2f;
    y = y * f + 2.402265069591007e-1f;
    y = y * f + 6.931471805599453e-1f;
    y = y * f + 1.0f;
    y = (Vec)((IVec)y + (whole << 23));
    return tiny ? splat(0.0f) : y;
}

// log2(2**a + 2**b), where at least one of them is finite; absolute error below 1e-6.
inline Vec log2_of_sum(Vec a, Vec b) {
    const Vec larger = max(a, b), x = exp2((a > b ? b : a) - larger);
    Vec y = splat(-1.2370623648166656e-2f);
    y = y * x + 6.378752738237381e-2f;
    y = y * x - 1.5559986233711243e-1f;
    y = y * x + 2.561796307563782e-1f;
    y = y * x - 3.534546494483948e-1f;
    y = y * x + 4.800737500190735e-1f;
    y = y * x - 7.213107347488403e-1f;
    y = y * x + 1.4426947832107544f;
    return larger + y * x;
}

}  // namespace lite_attention::LITE_ISA

// The arithmetic of PTX on registers, which are plain unsigned words. Floats are exact to the bit wherever
// PTX defines the bits; approximate instructions are computed in double and rounded once, so they are better
// than any GPU's.
#pragma once
#include <bit>
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "emulator.h"

namespace emu {

// ---- floating types ----
struct f16 {
    using Word = u16;
    static constexpr int kExponent = 5, kMantissa = 10;
};
struct bf16 {
    using Word = u16;
    static constexpr int kExponent = 8, kMantissa = 7;
};
struct tf32 {
    using Word = u32;
    static constexpr int kExponent = 8, kMantissa = 10;
};
struct f32 {
    using Word = u32;
    static constexpr int kExponent = 8, kMantissa = 23;
};
struct f64 {
    using Word = u64;
};
struct e4m3 {
    using Word = u8;
};
struct e5m2 {
    using Word = u8;
    static constexpr int kExponent = 5, kMantissa = 2;
};

enum class Round : u8 { kNearest, kZero, kDown, kUp, kAway };  // .rn .rz .rm .rp .rna

// A value that the compiler knows nothing about: arithmetic on it stays between the changes of the rounding
// mode.
template <class T>
EMU_INLINE T opaque(T x) {
#if defined(__x86_64__)
    if constexpr (std::is_floating_point_v<T>)
        asm volatile("" : "+x"(x));
    else
        asm volatile("" : "+r"(x));
    return x;
#else
    const volatile T copy = x;
    return copy;
#endif
}

// op() under a rounding mode; op takes its operands through `opaque`.
template <Round R, class Op>
EMU_INLINE auto rounded(Op op) {
    if constexpr (R == Round::kNearest) {
        return op();
    } else {
        static_assert(R != Round::kAway);
        std::fesetround(R == Round::kZero ? FE_TOWARDZERO : R == Round::kDown ? FE_DOWNWARD : FE_UPWARD);
        const auto result = opaque(op());
        std::fesetround(FE_TONEAREST);
        return result;
    }
}

constexpr u32 kNan32 = 0x7fffffffu;
constexpr u64 kNan64 = 0x7fffffffffffffffull;

EMU_INLINE float as_float(u32 bits) { return std::bit_cast<float>(bits); }
EMU_INLINE double as_double(u64 bits) { return std::bit_cast<double>(bits); }
EMU_INLINE u32 word_of(float x) { return x != x ? kNan32 : std::bit_cast<u32>(x); }  // the GPU's one NaN
EMU_INLINE u64 word_of(double x) { return x != x ? 0x7ff8000000000000ull : std::bit_cast<u64>(x); }
EMU_INLINE u32 flush(u32 x) { return (x & 0x7f800000u) == 0 ? x & 0x80000000u : x; }

template <bool Ftz>
EMU_INLINE float operand(u32 x) {
    return as_float(Ftz ? flush(x) : x);
}
template <bool Ftz, bool Sat>
EMU_INLINE u32 result32(float x) {
    if (Sat) x = x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;  // NaN becomes 0
    return Ftz ? flush(word_of(x)) : word_of(x);
}

// The sum rounded to odd: rounding it again to half the digits or fewer is as good as rounding once.
static inline double odd_sum(double a, double b) {
    const double sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const double b_part = sum - a;
    const double error = (a - (sum - b_part)) + (b - b_part);
    if (error == 0.0) return sum;
    u64 bits = std::bit_cast<u64>(sum);
    if ((error > 0) != (sum > 0)) --bits;  // toward zero
    return std::bit_cast<double>(bits | 1);
}

// x rounded to a format of `exponent` and `mantissa` bits with infinities; the one place where narrow floats
// are made.
template <int Exponent, int Mantissa>
static inline u32 encode(double x, Round round) {
    constexpr int kBias = (1 << (Exponent - 1)) - 1, kSmallest = 1 - kBias;
    constexpr u32 kInf = ((1u << Exponent) - 1) << Mantissa;
    const u32 sign = static_cast<u32>(std::signbit(x)) << (Exponent + Mantissa);
    if (x != x) return (1u << (Exponent + Mantissa)) - 1;
    const double magnitude = std::fabs(x);
    if (magnitude == 0.0) return sign;
    if (std::isinf(magnitude)) return sign | kInf;
    const int exponent = std::max(std::ilogb(magnitude), kSmallest);
    const int quantum = exponent - Mantissa;
    const double scaled = std::scalbn(magnitude, -quantum);
    double whole = std::floor(scaled);
    const double rest = scaled - whole;
    const bool up = round == Round::kNearest ? rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2.0) == 1.0)
                    : round == Round::kAway  ? rest >= 0.5
                    : round == Round::kZero  ? false
                                             : rest > 0.0 && (round == Round::kUp) == !sign;
    if (up) whole += 1.0;
    const u32 digits = static_cast<u32>(whole);
    u32 bits = digits;
    if (digits >= (1u << Mantissa))
        bits = (static_cast<u32>(exponent + kBias) << Mantissa) + (digits - (1u << Mantissa));
    if (bits >= kInf) {
        const bool to_infinity = round == Round::kNearest || round == Round::kAway ||
                                 (round == Round::kUp && !sign) || (round == Round::kDown && sign);
        bits = to_infinity ? kInf : kInf - 1;
    }
    return sign | bits;
}

template <int Exponent, int Mantissa>
static inline double decode(u32 bits) {
    constexpr int kBias = (1 << (Exponent - 1)) - 1;
    const u32 fraction = bits & ((1u << Mantissa) - 1);
    const int exponent = static_cast<int>((bits >> Mantissa) & ((1u << Exponent) - 1));
    const double sign = (bits >> (Exponent + Mantissa)) & 1 ? -1.0 : 1.0;
    if (exponent == (1 << Exponent) - 1)
        return fraction ? std::numeric_limits<double>::quiet_NaN()
                        : sign * std::numeric_limits<double>::infinity();
    if (exponent == 0) return sign * std::scalbn(static_cast<double>(fraction), 1 - kBias - Mantissa);
    return sign * std::scalbn(static_cast<double>(fraction | (1u << Mantissa)), exponent - kBias - Mantissa);
}

// e4m3 has no infinity and one NaN; conversions to it saturate at 448.
static inline u32 encode_e4m3(double x) {
    if (x != x) return 0x7f;
    const u32 sign = std::signbit(x) ? 0x80 : 0;
    if (std::fabs(x) >= 464.0) return sign | 0x7e;
    const u32 bits = encode<5, 3>(std::fabs(x), Round::kNearest);  // the same spacing, another bias
    if (std::fabs(x) < 0.015625) return sign | static_cast<u32>(std::nearbyint(std::fabs(x) * 512.0));
    return sign | (bits - (8u << 3));
}
static inline double decode_e4m3(u32 bits) {
    if ((bits & 0x7f) == 0x7f) return std::numeric_limits<double>::quiet_NaN();
    const u32 exponent = (bits >> 3) & 15, fraction = bits & 7;
    const double magnitude = exponent ? std::scalbn(8.0 + fraction, static_cast<int>(exponent) - 10)
                                      : std::scalbn(static_cast<double>(fraction), -9);
    return bits & 0x80 ? -magnitude : magnitude;
}

template <class T>
EMU_INLINE double widen(typename T::Word bits) {
    if constexpr (std::is_same_v<T, f64>)
        return as_double(bits);
    else if constexpr (std::is_same_v<T, f32> || std::is_same_v<T, tf32>)
        return as_float(bits);
    else if constexpr (std::is_same_v<T, bf16>)
        return as_float(static_cast<u32>(bits) << 16);
    else if constexpr (std::is_same_v<T, e4m3>)
        return decode_e4m3(bits);
    else
        return decode<T::kExponent, T::kMantissa>(bits);
}
template <class T>
EMU_INLINE typename T::Word narrow(double x, Round round = Round::kNearest) {
    if constexpr (std::is_same_v<T, f64>)
        return word_of(x);
    else if constexpr (std::is_same_v<T, e4m3>)
        return static_cast<u8>(encode_e4m3(x));
    else if constexpr (std::is_same_v<T, tf32>)
        return x != x ? kNan32 : encode<8, 10>(x, round) << 13;
    else if constexpr (std::is_same_v<T, f32>)
        return round == Round::kNearest ? word_of(static_cast<float>(x)) : encode<8, 23>(x, round);
    else
        return static_cast<typename T::Word>(encode<T::kExponent, T::kMantissa>(x, round));
}

template <class T>
EMU_INLINE u32 widen32(u16 bits) {
    return word_of(static_cast<float>(widen<T>(bits)));
}

// ---- float32 and float64 ----
template <Round R, bool Ftz, bool Sat>
EMU_INLINE u32 add_f32(u32 a, u32 b) {
    return result32<Ftz, Sat>(rounded<R>([&] { return opaque(operand<Ftz>(a)) + opaque(operand<Ftz>(b)); }));
}
template <Round R, bool Ftz, bool Sat>
EMU_INLINE u32 sub_f32(u32 a, u32 b) {
    return add_f32<R, Ftz, Sat>(a, b ^ 0x80000000u);
}
template <Round R, bool Ftz, bool Sat>
EMU_INLINE u32 mul_f32(u32 a, u32 b) {
    return result32<Ftz, Sat>(rounded<R>([&] { return opaque(operand<Ftz>(a)) * opaque(operand<Ftz>(b)); }));
}
template <Round R, bool Ftz, bool Sat>
EMU_INLINE u32 fma_f32(u32 a, u32 b, u32 c) {
    return result32<Ftz, Sat>(rounded<R>(
        [&] { return std::fma(opaque(operand<Ftz>(a)), opaque(operand<Ftz>(b)), opaque(operand<Ftz>(c))); }));
}
template <Round R, bool Ftz>
EMU_INLINE u32 div_f32(u32 a, u32 b) {
    return result32<Ftz, false>(
        rounded<R>([&] { return opaque(operand<Ftz>(a)) / opaque(operand<Ftz>(b)); }));
}
template <Round R, bool Ftz>
EMU_INLINE u32 sqrt_f32(u32 a) {
    return result32<Ftz, false>(rounded<R>([&] { return std::sqrt(opaque(operand<Ftz>(a))); }));
}
template <bool Ftz>
EMU_INLINE u32 neg_f32(u32 a) {
    return (Ftz ? flush(a) : a) ^ 0x80000000u;
}
template <bool Ftz>
EMU_INLINE u32 abs_f32(u32 a) {
    return (Ftz ? flush(a) : a) & 0x7fffffffu;
}

template <Round R>
EMU_INLINE u64 add_f64(u64 a, u64 b) {
    return word_of(rounded<R>([&] { return opaque(as_double(a)) + opaque(as_double(b)); }));
}
template <Round R>
EMU_INLINE u64 sub_f64(u64 a, u64 b) {
    return add_f64<R>(a, b ^ (1ull << 63));
}
template <Round R>
EMU_INLINE u64 mul_f64(u64 a, u64 b) {
    return word_of(rounded<R>([&] { return opaque(as_double(a)) * opaque(as_double(b)); }));
}
template <Round R>
EMU_INLINE u64 fma_f64(u64 a, u64 b, u64 c) {
    return word_of(rounded<R>(
        [&] { return std::fma(opaque(as_double(a)), opaque(as_double(b)), opaque(as_double(c))); }));
}
template <Round R>
EMU_INLINE u64 div_f64(u64 a, u64 b) {
    return word_of(rounded<R>([&] { return opaque(as_double(a)) / opaque(as_double(b)); }));
}
template <Round R>
EMU_INLINE u64 sqrt_f64(u64 a) {
    return word_of(rounded<R>([&] { return std::sqrt(opaque(as_double(a))); }));
}
EMU_INLINE u64 neg_f64(u64 a) { return a ^ (1ull << 63); }
EMU_INLINE u64 abs_f64(u64 a) { return a & ~(1ull << 63); }

// ---- float16, bfloat16 and pairs of them: exact in double, rounded once ----
template <class T, bool Ftz, bool Sat, bool Relu>
EMU_INLINE u16 narrow16(double x) {
    if (Sat) x = x > 0.0 ? std::fmin(x, 1.0) : 0.0;
    if (Relu && !(x > 0.0)) x = x != x ? x : 0.0;
    u16 bits = narrow<T>(x);
    if (Ftz && (bits & 0x7fff) < (1u << T::kMantissa)) bits &= 0x8000;
    return bits;
}
template <class T, bool Ftz>
EMU_INLINE double widen16(u16 x) {
    if (Ftz && (x & 0x7fff) < (1u << T::kMantissa)) x &= 0x8000;
    return widen<T>(x);
}
template <class T, bool Ftz, bool Sat>
EMU_INLINE u16 add_16(u16 a, u16 b) {
    return narrow16<T, Ftz, Sat, false>(odd_sum(widen16<T, Ftz>(a), widen16<T, Ftz>(b)));
}
template <class T, bool Ftz, bool Sat>
EMU_INLINE u16 sub_16(u16 a, u16 b) {
    return narrow16<T, Ftz, Sat, false>(odd_sum(widen16<T, Ftz>(a), -widen16<T, Ftz>(b)));
}
template <class T, bool Ftz, bool Sat>
EMU_INLINE u16 mul_16(u16 a, u16 b) {
    return narrow16<T, Ftz, Sat, false>(widen16<T, Ftz>(a) * widen16<T, Ftz>(b));
}
template <class T, bool Ftz, bool Sat, bool Relu>
EMU_INLINE u16 fma_16(u16 a, u16 b, u16 c) {
    return narrow16<T, Ftz, Sat, Relu>(odd_sum(widen16<T, Ftz>(a) * widen16<T, Ftz>(b), widen16<T, Ftz>(c)));
}
template <class T, bool Ftz>
EMU_INLINE u16 neg_16(u16 a) {
    return (Ftz && (a & 0x7fff) < (1u << T::kMantissa) ? a & 0x8000 : a) ^ 0x8000;
}
template <class T, bool Ftz>
EMU_INLINE u16 abs_16(u16 a) {
    return (Ftz && (a & 0x7fff) < (1u << T::kMantissa) ? 0 : a) & 0x7fff;
}

// op on both halves of packed operands
template <class Op, class... Words>
EMU_INLINE u32 packed(Op op, Words... words) {
    const u32 low = op(static_cast<u16>(words)...), high = op(static_cast<u16>(words >> 16)...);
    return low | high << 16;
}

// ---- minimum and maximum ----
// One NaN loses unless `Nan`; -0 is below +0; Abs compares magnitudes and gives the xor of the signs.
template <class T, bool Max, bool Ftz, bool Nan, bool XorSignAbs>
EMU_INLINE typename T::Word minmax_float(typename T::Word a, typename T::Word b) {
    using Word = typename T::Word;
    constexpr int kBits = sizeof(Word) * 8;
    constexpr Word kSign = static_cast<Word>(Word{1} << (kBits - 1));
    constexpr Word kNan = std::is_same_v<T, f64> ? static_cast<Word>(0x7ff8000000000000ull)
                                                 : static_cast<Word>(static_cast<Word>(~Word{0}) >> 1);
    if constexpr (Ftz && std::is_same_v<T, f32>) a = flush(a), b = flush(b);
    const Word sign = (a ^ b) & kSign;
    if (XorSignAbs) a &= static_cast<Word>(~kSign), b &= static_cast<Word>(~kSign);
    const double x = widen<T>(a), y = widen<T>(b);
    if (x != x || y != y) {
        if (Nan || (x != x && y != y)) return kNan;
        return (x != x ? b : a) | (XorSignAbs ? sign : 0);
    }
    const bool a_less = x < y || (x == y && (a & kSign) && !(b & kSign));
    return (a_less != Max ? a : b) | (XorSignAbs ? sign : 0);
}

// ---- approximate functions ----
template <bool Ftz, class Op>
EMU_INLINE u32 approximate(u32 a, Op op) {
    return result32<Ftz, false>(static_cast<float>(op(static_cast<double>(operand<Ftz>(a)))));
}
template <bool Ftz>
static inline u32 ex2(u32 a) {
    return approximate<Ftz>(a, [](double x) { return std::exp2(x); });
}
template <bool Ftz>
static inline u32 lg2(u32 a) {
    return approximate<Ftz>(a, [](double x) { return std::log2(x); });
}
template <bool Ftz>
static inline u32 rcp_approx(u32 a) {
    return approximate<Ftz>(a, [](double x) { return 1.0 / x; });
}
template <bool Ftz>
static inline u32 rsqrt_approx(u32 a) {
    return approximate<Ftz>(a, [](double x) { return x == 0 ? 1.0 / x : 1.0 / std::sqrt(x); });
}
template <bool Ftz>
static inline u32 sin_approx(u32 a) {
    return approximate<Ftz>(a, [](double x) { return std::sin(x); });
}
template <bool Ftz>
static inline u32 cos_approx(u32 a) {
    return approximate<Ftz>(a, [](double x) { return std::cos(x); });
}
static inline u32 tanh_approx(u32 a) {
    return approximate<false>(a, [](double x) { return std::tanh(x); });
}
template <class T>
static inline u16 ex2_16(u16 a) {
    return narrow<T>(std::exp2(widen<T>(a)));
}
template <class T>
static inline u16 tanh_16(u16 a) {
    return narrow<T>(std::tanh(widen<T>(a)));
}
static inline u64 rcp_ftz_f64(u64 a) { return word_of(1.0 / as_double(a)) & 0xffffffff00000000ull; }
static inline u64 rsqrt_ftz_f64(u64 a) {
    return word_of(1.0 / std::sqrt(as_double(a))) & 0xffffffff00000000ull;
}

// ---- comparison ----
enum class Compare : u8 { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

template <Compare C, class T>
EMU_INLINE bool compare_values(T a, T b) {
    const bool unordered = a != a || b != b;
    switch (C) {
        case Compare::kEq:
            return a == b;
        case Compare::kNe:
            return !unordered && a != b;
        case Compare::kLt:
            return a < b;
        case Compare::kLe:
            return a <= b;
        case Compare::kGt:
            return a > b;
        case Compare::kGe:
            return a >= b;
        case Compare::kEqu:
            return unordered || a == b;
        case Compare::kNeu:
            return unordered || a != b;
        case Compare::kLtu:
            return unordered || a < b;
        case Compare::kLeu:
            return unordered || a <= b;
        case Compare::kGtu:
            return unordered || a > b;
        case Compare::kGeu:
            return unordered || a >= b;
        case Compare::kNum:
            return !unordered;
        case Compare::kNan:
            return unordered;
    }
}
template <Compare C, class T, bool Ftz, class Word>
EMU_INLINE bool compare(Word a, Word b) {
    if constexpr (std::is_integral_v<T>)
        return compare_values<C>(static_cast<T>(a), static_cast<T>(b));
    else if constexpr (std::is_same_v<T, f32>)
        return compare_values<C>(operand<Ftz>(a), operand<Ftz>(b));
    else
        return compare_values<C>(widen<T>(a), widen<T>(b));
}

// ---- integers ----
template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
EMU_INLINE Unsigned<T> minmax_int(T a, T b, bool max) {
    return static_cast<Unsigned<T>>((a < b) != max ? a : b);
}
template <class T>
EMU_INLINE auto wider(T x) {
    if constexpr (sizeof(T) == 8) {
        if constexpr (std::is_signed_v<T>)
            return static_cast<__int128>(x);
        else
            return static_cast<unsigned __int128>(x);
    } else if constexpr (std::is_signed_v<T>) {
        return static_cast<s64>(x);
    } else {
        return static_cast<u64>(x);
    }
}
template <class T>
EMU_INLINE Unsigned<T> mul_high(T a, T b) {
    return static_cast<Unsigned<T>>((wider(a) * wider(b)) >> (sizeof(T) * 8));
}
template <class T>  // the product in a register of twice the width
EMU_INLINE auto mul_wide(T a, T b) {
    if constexpr (sizeof(T) == 2)
        return static_cast<u32>(wider(a) * wider(b));
    else
        return static_cast<u64>(wider(a) * wider(b));
}
template <class T>
EMU_INLINE Unsigned<T> saturate(__int128 x) {
    if (x > std::numeric_limits<T>::max()) return static_cast<Unsigned<T>>(std::numeric_limits<T>::max());
    if (x < std::numeric_limits<T>::min()) return static_cast<Unsigned<T>>(std::numeric_limits<T>::min());
    return static_cast<Unsigned<T>>(x);
}
template <class T>  // PTX leaves division by zero open; GPUs give all ones
EMU_INLINE Unsigned<T> divide(T a, T b) {
    if (b == 0) return static_cast<Unsigned<T>>(~Unsigned<T>{0});
    return static_cast<Unsigned<T>>(static_cast<__int128>(a) / b);
}
template <class T>
EMU_INLINE Unsigned<T> remainder(T a, T b) {
    if (b == 0) return static_cast<Unsigned<T>>(a);
    return static_cast<Unsigned<T>>(static_cast<__int128>(a) % b);
}
template <class T>
EMU_INLINE Unsigned<T> shift_left(T a, u32 count) {
    return count >= sizeof(T) * 8 ? 0 : static_cast<Unsigned<T>>(static_cast<Unsigned<T>>(a) << count);
}
template <class T>
EMU_INLINE Unsigned<T> shift_right(T a, u32 count) {
    constexpr u32 kLast = sizeof(T) * 8 - 1;
    if (count > kLast) {
        if constexpr (!std::is_signed_v<T>) return 0;
        count = kLast;
    }
    return static_cast<Unsigned<T>>(a >> count);
}
EMU_INLINE u32 funnel_left(u32 low, u32 high, u32 count, bool clamp) {
    count = clamp ? (count > 32 ? 32 : count) : count & 31;
    return count == 32 ? low : static_cast<u32>(((static_cast<u64>(high) << 32 | low) << count) >> 32);
}
EMU_INLINE u32 funnel_right(u32 low, u32 high, u32 count, bool clamp) {
    count = clamp ? (count > 32 ? 32 : count) : count & 31;
    return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> count);
}
template <class T>
EMU_INLINE Unsigned<T> extract_bits(T a, u32 position, u32 length) {
    constexpr u32 kBits = sizeof(T) * 8;
    position &= 0xff, length &= 0xff;
    Unsigned<T> field = position >= kBits ? 0 : static_cast<Unsigned<T>>(a) >> position;
    if (length < kBits) field &= (Unsigned<T>{1} << length) - 1;
    if constexpr (std::is_signed_v<T>) {
        if (length == 0) return 0;
        const u32 top = position + length - 1 < kBits ? position + length - 1 : kBits - 1;
        const bool negative = (static_cast<Unsigned<T>>(a) >> top) & 1;
        if (negative && length < kBits) field |= ~Unsigned<T>{0} << length;
        if (negative && position >= kBits) field = ~Unsigned<T>{0};
        if (negative && position < kBits && position + length > kBits)
            field |= ~Unsigned<T>{0} << (kBits - position);
    }
    return field;
}
template <class T>
EMU_INLINE T insert_bits(T field, T into, u32 position, u32 length) {
    constexpr u32 kBits = sizeof(T) * 8;
    position &= 0xff, length &= 0xff;
    if (position >= kBits || length == 0) return into;
    const T ones = length >= kBits ? ~T{0} : (T{1} << length) - 1;
    const T mask = ones << position;
    return (into & ~mask) | ((field << position) & mask);
}
template <class T>
EMU_INLINE T reverse_bits(T x) {
    T result = 0;
    for (u32 i = 0; i < sizeof(T) * 8; ++i) result |= ((x >> i) & 1) << (sizeof(T) * 8 - 1 - i);
    return result;
}
template <class T>
EMU_INLINE u32 find_leading(T x, bool shift_amount) {
    Unsigned<T> bits = static_cast<Unsigned<T>>(x);
    if constexpr (std::is_signed_v<T>)
        if (x < 0) bits = static_cast<Unsigned<T>>(~bits);
    if (bits == 0) return ~0u;
    const u32 position = sizeof(T) * 8 - 1 - static_cast<u32>(std::countl_zero(bits));
    return shift_amount ? sizeof(T) * 8 - 1 - position : position;
}
static inline u32 find_nth(u32 mask, u32 base, s32 offset) {
    base &= 31;
    if (offset == 0) return mask >> base & 1 ? base : ~0u;
    const s32 step = offset > 0 ? 1 : -1;
    s32 left = offset > 0 ? offset : -offset;
    for (s32 position = static_cast<s32>(base); position >= 0 && position < 32; position += step)
        if ((mask >> position & 1) && --left == 0) return static_cast<u32>(position);
    return ~0u;
}
EMU_INLINE u32 bit_mask(u32 position, u32 length, bool clamp) {
    if (!clamp) position &= 31, length &= 31;
    const u64 ones = length >= 32 ? 0xffffffffull : (1ull << length) - 1;
    return position >= 32 ? 0 : static_cast<u32>(ones << position);
}
template <class T>
EMU_INLINE u32 extend_sign(u32 x, u32 width, bool clamp) {
    width = clamp ? (width > 32 ? 32 : width) : width & 31;
    if (width == 0) return 0;
    if (width == 32) return x;
    const u32 low = x & ((1u << width) - 1);
    return std::is_signed_v<T> && (x >> (width - 1) & 1) ? low | ~0u << width : low;
}
template <u8 Table>
EMU_INLINE u32 logic3(u32 a, u32 b, u32 c) {
    u32 result = 0;
    if (Table & 0x01) result |= ~a & ~b & ~c;
    if (Table & 0x02) result |= ~a & ~b & c;
    if (Table & 0x04) result |= ~a & b & ~c;
    if (Table & 0x08) result |= ~a & b & c;
    if (Table & 0x10) result |= a & ~b & ~c;
    if (Table & 0x20) result |= a & ~b & c;
    if (Table & 0x40) result |= a & b & ~c;
    if (Table & 0x80) result |= a & b & c;
    return result;
}
EMU_INLINE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 result = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 nibble = selector >> (4 * i) & 15;
        u32 byte = static_cast<u32>(bytes >> (8 * (nibble & 7))) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
// The modes of prmt that name a pattern: byte i of the result is byte `chosen` of the pair.
enum class Permute : u8 { kForward4, kBackward4, kReplicate8, kClampLeft, kClampRight, kReplicate16 };
template <Permute P>
EMU_INLINE u32 permute_pattern(u32 a, u32 b, u32 selector) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    const u32 c = selector & 3;
    u32 result = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 chosen = P == Permute::kForward4     ? i + c
                           : P == Permute::kBackward4  ? (c + 8 - i) & 7
                           : P == Permute::kReplicate8 ? c
                           : P == Permute::kClampLeft  ? (i > c ? i : c)
                           : P == Permute::kClampRight ? (i < c ? i : c)
                                                       : (c & 1) * 2 + (i & 1);
        result |= (static_cast<u32>(bytes >> (8 * chosen)) & 0xff) << (8 * i);
    }
    return result;
}
template <class A, class B>
EMU_INLINE u32 dot4(u32 a, u32 b, u32 c) {
    u32 sum = c;
    for (u32 i = 0; i < 4; ++i)
        sum += static_cast<u32>(static_cast<s32>(static_cast<A>(a >> (8 * i))) *
                                static_cast<s32>(static_cast<B>(b >> (8 * i))));
    return sum;
}
template <class A, class B>  // a holds two 16-bit values, b four 8-bit ones
EMU_INLINE u32 dot2(u32 a, u32 b, u32 c, bool high) {
    u32 sum = c;
    for (u32 i = 0; i < 2; ++i)
        sum += static_cast<u32>(static_cast<s32>(static_cast<A>(a >> (16 * i))) *
                                static_cast<s32>(static_cast<B>(b >> (8 * (i + 2 * high)))));
    return sum;
}

// add.cc and its kin: `carry` is the condition-code register
template <class T>
EMU_INLINE T add_carry(T a, T b, bool in, bool& carry) {
    T sum, total;
    const bool first = __builtin_add_overflow(a, b, &sum),
               second = __builtin_add_overflow(sum, T{in}, &total);
    carry = first || second;
    return total;
}
template <class T>
EMU_INLINE T sub_borrow(T a, T b, bool in, bool& borrow) {
    T difference, total;
    const bool first = __builtin_sub_overflow(a, b, &difference);
    const bool second = __builtin_sub_overflow(difference, T{in}, &total);
    borrow = first || second;
    return total;
}

// ---- conversion ----
template <Round R>
EMU_INLINE double to_integral(double x) {
    return R == Round::kNearest ? std::nearbyint(x)
           : R == Round::kZero  ? std::trunc(x)
           : R == Round::kDown  ? std::floor(x)
                                : std::ceil(x);
}
template <class T, class F, Round R, bool Ftz>  // NaN gives 0, the rest saturates
EMU_INLINE Unsigned<T> float_to_int(typename F::Word bits) {
    if constexpr (Ftz && std::is_same_v<F, f32>) bits = flush(bits);
    const double x = to_integral<R>(widen<F>(bits));
    if (x != x) return 0;
    constexpr double kLow = static_cast<double>(std::numeric_limits<T>::min());
    constexpr double kHigh = static_cast<double>(std::numeric_limits<T>::max());
    if (x <= kLow) return static_cast<Unsigned<T>>(std::numeric_limits<T>::min());
    if (x >= kHigh) return static_cast<Unsigned<T>>(std::numeric_limits<T>::max());
    return static_cast<Unsigned<T>>(static_cast<T>(x));
}
template <class F, class T, Round R, bool Sat>
EMU_INLINE typename F::Word int_to_float(T value) {
    if constexpr (std::is_same_v<F, f64>) {
        return word_of(rounded<R>([&] { return static_cast<double>(opaque(value)); }));
    } else if constexpr (std::is_same_v<F, f32>) {
        return result32<false, Sat>(rounded<R>([&] { return static_cast<float>(opaque(value)); }));
    } else {
        const double high = static_cast<double>(static_cast<T>(value >> (sizeof(T) > 4 ? 32 : 0))) *
                            (sizeof(T) > 4 ? 4294967296.0 : 1.0);
        const double low = sizeof(T) > 4 ? static_cast<double>(static_cast<u32>(value)) : 0.0;
        const double x = odd_sum(high, low);
        return narrow<F>(Sat ? std::fmin(std::fmax(x, 0.0), 1.0) : x, R);
    }
}
template <class To, class From, Round R, bool Ftz, bool Sat, bool Relu, bool Finite>
EMU_INLINE typename To::Word float_to_float(typename From::Word bits) {
    if constexpr (Ftz && std::is_same_v<From, f32>) bits = flush(bits);
    double x = widen<From>(bits);
    if (Sat) x = x > 0.0 ? std::fmin(x, 1.0) : 0.0;
    if (Relu && x < 0.0) x = 0.0;
    if (Relu && x == 0.0) x = 0.0;
    auto result = narrow<To>(x, R);
    if constexpr (Finite &&
                  (std::is_same_v<To, f16> || std::is_same_v<To, bf16> || std::is_same_v<To, e5m2>)) {
        constexpr u32 kInf = ((1u << To::kExponent) - 1) << To::kMantissa;
        constexpr u32 kSign = 1u << (To::kExponent + To::kMantissa);
        if ((result & (kSign - 1)) == kInf)
            result = static_cast<typename To::Word>((result & kSign) | (kInf - 1));
    }
    if constexpr (Ftz && std::is_same_v<To, f32>) result = flush(result);
    return result;
}
template <class F, Round R, bool Ftz, bool Sat>  // cvt.r?i.f.f: to an integral value of the same type
EMU_INLINE typename F::Word round_float(typename F::Word bits) {
    if constexpr (Ftz && std::is_same_v<F, f32>) bits = flush(bits);
    double x = std::copysign(to_integral<R>(widen<F>(bits)), widen<F>(bits));
    if (Sat) x = x > 0.0 ? std::fmin(x, 1.0) : 0.0;
    return narrow<F>(x);
}

template <class T>
EMU_INLINE bool test_property(typename T::Word bits, int property) {
    const int kind = std::fpclassify(std::is_same_v<T, f32> ? as_float(static_cast<u32>(bits)) : 0.0f);
    const int wide = std::fpclassify(widen<T>(bits));
    const int found = std::is_same_v<T, f32> ? kind : wide;
    switch (property) {
        case 0:
            return found != FP_NAN && found != FP_INFINITE;  // finite
        case 1:
            return found == FP_INFINITE;
        case 2:
            return found != FP_NAN;  // number
        case 3:
            return found == FP_NAN;
        case 4:
            return found == FP_NORMAL;
        default:
            return found == FP_SUBNORMAL;
    }
}

}  // namespace emu

// The run-time half of ptx2cpp.py: PTX instructions that C++ has no expression for, memory and registration.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "simt.h"

namespace ptx {

using b128 = unsigned __int128;

// Kernels of a translated file; their launchers must not run the C++ source in their place.
struct Register {
  Register(std::initializer_list<simt::Translated> kernels) {
    for (const simt::Translated& kernel : kernels) simt::register_translated(kernel);
    simt::config.require_translated = true;
  }
};

// Memory --------------------------------------------------------------------------------------------------------------

inline unsigned char* checked(unsigned char* p, size_t size, int kind, int line) {
  simt::access(p, size, kind, line);
  return p;
}
template <class T>
T load(const unsigned char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class T>
void store(unsigned char* p, T value) {
  std::memcpy(p, &value, sizeof value);
}
template <class T>
T atomic_xor(T* p, T value) {
  return simt::rmw<T>(p, [](T a, T b) { return T(a ^ b); }, value);
}

// Bits ----------------------------------------------------------------------------------------------------------------

// The low bits of a register as another type.
template <class T, class R>
T as(R bits) {
  static_assert(sizeof(T) <= sizeof(R));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}
template <class T>
constexpr int width = int(sizeof(T)) * 8;

template <class T>
T shl(T a, uint32_t n) {
  return n < width<T> ? T(a << n) : T(0);
}
template <class T>
T shr(T a, uint32_t n) {
  return n < width<T> ? T(a >> n) : T(a < 0 ? -1 : 0);
}
inline uint32_t shf_l(uint32_t low, uint32_t high, uint32_t n) {
  return uint32_t(((uint64_t(high) << 32 | low) << n) >> 32);
}
inline uint32_t shf_r(uint32_t low, uint32_t high, uint32_t n) { return uint32_t((uint64_t(high) << 32 | low) >> n); }
template <class T>
uint32_t clz(T a) {
  return a ? uint32_t(__builtin_clzll(a)) - (64 - width<T>) : width<T>;
}
template <class T>
T brev(T a) {
  T out = 0;
  for (int i = 0; i < width<T>; ++i) out |= (a >> i & 1) << (width<T> - 1 - i);
  return out;
}
// Position of the highest bit that differs from the sign; ~0 if there is none.
template <class T>
uint32_t bfind(T a) {
  using U = std::make_unsigned_t<T>;
  const U bits = a < 0 ? U(~a) : U(a);
  return bits ? width<T> - 1 - clz(bits) : ~0u;
}
template <class T>
uint32_t bfind_shift(T a) {
  const uint32_t position = bfind(a);
  return position == ~0u ? ~0u : width<T> - 1 - position;
}
template <class T>
T bfe(T a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (length == 0) return 0;
  const uint32_t last = std::min<uint32_t>(position + length - 1, width<T> - 1);
  const bool sign = std::is_signed_v<T> && (a >> last & 1);
  std::make_unsigned_t<T> out = 0;
  for (uint32_t i = 0; i < width<T>; ++i) {
    const bool bit = i < length && position + i < width<T> ? a >> (position + i) & 1 : sign;
    out |= std::make_unsigned_t<T>(bit) << i;
  }
  return T(out);
}
template <class T>
T bfi(T a, T b, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  const T mask = shl(length < width<T> ? T((T(1) << length) - 1) : T(~T(0)), position);
  return (b & ~mask) | (shl(a, position) & mask);
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t out = 0;
  for (uint32_t i = 0; i < 8; ++i)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 15, byte = uint32_t(bytes >> 8 * (choice & 7)) & 255;
    out |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}

// Integers ------------------------------------------------------------------------------------------------------------

template <class T>
auto mul_wide(T a, T b) {
  if constexpr (sizeof(T) == 2)
    return int32_t(a) * int32_t(b);
  else
    return std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>(a) * b;
}
template <class T>
T mul_hi(T a, T b) {
  return T(static_cast<std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>(a) * b >> width<T>);
}
template <class T>
T abs(T a) {
  using U = std::make_unsigned_t<T>;
  return a < 0 ? T(U(0) - U(a)) : a;
}
// The quotient by zero is all ones, as the hardware gives.
template <class T>
T div(T a, T b) {
  if (b == 0) return T(-1);
  return std::is_signed_v<T> && b == T(-1) ? T(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a)) : T(a / b);
}
template <class T>
T rem(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}

// Floats --------------------------------------------------------------------------------------------------------------

inline float widen(__half x) { return __half2float(x); }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class F>
T round(F x) {
  if constexpr (std::is_same_v<T, __half>)
    return __double2half(double(x));
  else
    return __double2bfloat16(double(x));
}
template <class T>
T pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half2>)
    return __floats2half2_rn(low, high);
  else
    return __floats2bfloat162_rn(low, high);
}

// An operation on 16-bit floats or pairs of them, computed as double and rounded once.
template <class F, class... Args>
auto lift(F f, Args... args) {
  using T = std::common_type_t<Args...>;
  if constexpr (sizeof(T) == 2) {
    return round<T>(f(double(widen(args))...));
  } else {
    using Half = std::conditional_t<std::is_same_v<T, __half2>, __half, __nv_bfloat16>;
    T out;
    out.x = lift(f, Half(args.x)...), out.y = lift(f, Half(args.y)...);
    return out;
  }
}

// The smaller of the numbers if one is NaN; -0 is below +0.
template <class T>
T min(T a, T b) {
  return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
}
template <class T>
T max(T a, T b) {
  return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
}
template <class T>
T min_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : min(a, b);
}
template <class T>
T max_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : max(a, b);
}
template <class T>
T saturate(T x) {
  return x > 0 ? std::min(x, T(1)) : T(0);
}

// Of an integer to a narrower one, or of a rounded float: to the nearest that T has; NaN gives 0.
template <class T, class S>
T clamp(S x) {
  if constexpr (std::is_integral_v<S>) {
    const __int128 low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max(), wide = x;
    return T(std::clamp(wide, low, high));
  } else {
    if (std::isnan(x)) return 0;
    if (x <= S(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
    return x >= S(std::numeric_limits<T>::max()) ? std::numeric_limits<T>::max() : T(x);
  }
}

}  // namespace ptx

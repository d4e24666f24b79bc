#include "numbers.h"

namespace ptx {
namespace {

template <class Float>
Float of_floats(int op, Float a, Float b) {
  switch (op) {
    case OP_ADD: return a + b;
    case OP_SUB: return a - b;
    case OP_MUL: return a * b;
    case OP_DIV: return a / b;
    case OP_MAX: return a != a ? b : b != b ? a : std::max(a, b);
    case OP_MIN: return a != a ? b : b != b ? a : std::min(a, b);
  }
  throw Stopped("no such operation on floats");
}

u64 high_product(int type, u64 a, u64 b) {
  int bits = 8 * kBytes[type];
  if (is_signed(type))
    return static_cast<u64>(static_cast<__int128>(signed_of(type, a)) * signed_of(type, b) >> bits);
  return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> bits);
}

u64 shifted_right(int type, u64 x, u32 n) {
  if (is_signed(type)) return static_cast<u64>(signed_of(type, x) >> std::min<u32>(n, 63));
  return n >= 8u * kBytes[type] ? 0 : x >> n;
}

u64 of_integers(int op, int type, u64 a, u64 b) {
  bool with_sign = is_signed(type);
  i64 sa = signed_of(type, a), sb = signed_of(type, b);
  switch (op) {
    case OP_ADD: return a + b;
    case OP_SUB: return a - b;
    case OP_MUL:
    case OP_MUL_LO: return a * b;
    case OP_MUL_HI: return high_product(type, a, b);
    case OP_DIV:
    case OP_REM:
      if (!b) throw Stopped("division by zero");
      if (with_sign) return static_cast<u64>(op == OP_DIV ? sa / sb : sa % sb);
      return op == OP_DIV ? a / b : a % b;
    case OP_MAX: return with_sign ? static_cast<u64>(std::max(sa, sb)) : std::max(a, b);
    case OP_MIN: return with_sign ? static_cast<u64>(std::min(sa, sb)) : std::min(a, b);
    case OP_AND: return a & b;
    case OP_OR: return a | b;
    case OP_XOR: return a ^ b;
    // a count of 32 bits, whatever the type
    case OP_SHL: return static_cast<u32>(b) >= 8u * kBytes[type] ? 0 : a << b;
    case OP_SHR: return shifted_right(type, a, static_cast<u32>(b));
  }
  throw Stopped("no such operation on integers");
}

template <class T>
bool ordered(int comparison, T a, T b) {
  switch (comparison) {
    case IS_eq: case IS_equ: return a == b;
    case IS_ne: case IS_neu: return a != b;
    case IS_lt: case IS_ltu: case IS_lo: return a < b;
    case IS_le: case IS_leu: case IS_ls: return a <= b;
    case IS_gt: case IS_gtu: case IS_hi: return a > b;
    case IS_ge: case IS_geu: case IS_hs: return a >= b;
  }
  throw Stopped("no such comparison");
}

double rounded(double x, int rounding) {
  switch (rounding) {
    case kInteger: return std::nearbyint(x);
    case kZero: return std::trunc(x);
    case kDown: return std::floor(x);
    case kUp: return std::ceil(x);
  }
  return x;
}

u64 integer_of(int to, double x, int rounding) {
  if (x != x) return 0;
  x = rounded(x, rounding == kNearest ? kZero : rounding);
  int bits = 8 * kBytes[to];
  double least = is_signed(to) ? -std::ldexp(1, bits - 1) : 0;
  double most = std::ldexp(1, is_signed(to) ? bits - 1 : bits) - 1;
  x = std::min(most, std::max(least, x));
  return unsigned_of(to, is_signed(to) ? static_cast<u64>(static_cast<i64>(x))
                                       : static_cast<u64>(x));
}

}  // namespace

u64 binary(int op, int type, u64 x, u64 y, bool flush) {
  if (type == T_f64) return of_f64(of_floats(op, to_f64(x), to_f64(y)));
  if (is_small_float(type)) {
    float a = to_float(type, x), b = to_float(type, y);
    if (!flush) return of_float(type, of_floats(op, a, b));
    return of_float(type, flushed(of_floats(op, flushed(a), flushed(b))));
  }
  if (is_pair(type)) {
    int half = half_of(type);
    return binary(op, half, x & 0xffff, y & 0xffff, flush) |
           binary(op, half, x >> 16 & 0xffff, y >> 16 & 0xffff, flush) << 16;
  }
  u64 count = op == OP_SHL || op == OP_SHR ? y & 0xffffffff : unsigned_of(type, y);
  return unsigned_of(type, of_integers(op, type, unsigned_of(type, x), count));
}

u64 fused(int type, u64 x, u64 y, u64 z, bool flush, bool down) {
  if (type == T_f64) return of_f64(std::fma(to_f64(x), to_f64(y), to_f64(z)));
  if (is_pair(type)) {
    int half = half_of(type);
    return fused(half, x, y, z, flush, down) |
           fused(half, x >> 16, y >> 16, z >> 16, flush, down) << 16;
  }
  float a = to_float(type, x), b = to_float(type, y), c = to_float(type, z);
  if (down) {  // .rm: the nearest from below
    double exact = std::fma(static_cast<double>(a), static_cast<double>(b), static_cast<double>(c));
    float near = static_cast<float>(exact);
    return of_f32(near > exact ? std::nextafter(near, -INFINITY) : near);
  }
  if (!flush) return of_float(type, std::fma(a, b, c));
  return of_float(type, flushed(std::fma(flushed(a), flushed(b), flushed(c))));
}

bool compare(int comparison, int type, u64 x, u64 y, bool flush) {
  if (!is_float(type)) {
    bool with_sign = is_signed(type) && (comparison < IS_lo || comparison > IS_hs);
    if (with_sign) return ordered(comparison, signed_of(type, x), signed_of(type, y));
    return ordered(comparison, unsigned_of(type, x), unsigned_of(type, y));
  }
  double a = type == T_f64 ? to_f64(x) : to_float(type, x);
  double b = type == T_f64 ? to_f64(y) : to_float(type, y);
  if (flush) a = flushed(static_cast<float>(a)), b = flushed(static_cast<float>(b));
  bool unordered = a != a || b != b;
  if (comparison == IS_num) return !unordered;
  if (comparison == IS_nan) return unordered;
  if (unordered) return comparison >= IS_equ;
  return ordered(comparison, a, b);
}

u64 convert(int to, int from, u64 x, int rounding, bool saturates) {
  if (!is_float(from)) {
    u64 wide = widened(from, x);
    if (!is_float(to)) return unsigned_of(to, wide);
    bool with_sign = is_signed(from);
    i64 value = static_cast<i64>(wide);
    if (to == T_f64)
      return of_f64(with_sign ? static_cast<double>(value) : static_cast<double>(wide));
    return of_float(to, with_sign ? static_cast<float>(value) : static_cast<float>(wide));
  }
  double value = from == T_f64 ? to_f64(x) : to_float(from, x);
  if (!is_float(to)) return integer_of(to, value, rounding);
  value = rounded(value, rounding);
  if (saturates) value = value != value ? 0 : std::min(1.0, std::max(0.0, value));
  return to == T_f64 ? of_f64(value) : of_float(to, static_cast<float>(value));
}

}  // namespace ptx

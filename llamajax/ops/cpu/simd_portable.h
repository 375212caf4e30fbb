// What any compiler makes of 4 lanes; with NEON's dot products where they are built in.
constexpr int kLanes = 4;
constexpr int kTileRows = 2, kBroadcasts = 4, kRegisters = 16;
constexpr int kDenseRows = 2, kDenseWidth = kLanes;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
using InPairs = float;
using Rounded = int16_t;
constexpr bool kShortDots = false;

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline float widen(Half x) {
  const uint32_t exponent = x.bits >> 10 & 31, shifted = uint32_t(x.bits & 0x7fff) << 13;
  // Without the leading one, that is to say less the smallest number that has it, if the exponent is 0.
  const uint32_t bits = exponent == 31 ? shifted | 0x7f800000 : shifted + ((exponent ? 112u : 113u) << 23);
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  if (exponent == 0) magnitude -= 0x1p-14f;
  return x.bits & 0x8000 ? -magnitude : magnitude;
}
// To the nearest, ties to even; what is too large to infinity.
inline Half narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) return {uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00))};
  if (magnitude < 0x38800000) return {uint16_t(sign | uint32_t(std::lrint(std::ldexp(std::fabs(x), 24))))};
  return {uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}
inline Floats load(const Half* p) { return Floats{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
inline Floats load(const BFloat16* p) {
  Ints x = {p[0].bits << 16, p[1].bits << 16, p[2].bits << 16, p[3].bits << 16};
  return (Floats)x;
}
inline Floats load(const int8_t* p) { return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline void store(Half* p, Floats x) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow(x[i]);
}
inline void store(BFloat16* p, Floats x) {  // to the nearest, ties to even
  const Ints bits = (Ints)x, up = bits + 0x7fff + ((bits >> 16) & 1);
  for (int i = 0; i < kLanes; ++i) p[i].bits = uint16_t(uint32_t(up[i]) >> 16);
}
inline Floats held(Floats x) { return x; }
inline Floats all(float x) { return Floats{x, x, x, x}; }
inline Ints all(int32_t x) { return Ints{x, x, x, x}; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Ints add(Ints a, Ints b) {  // a + b must not overflow
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  return (Ints)((Unsigned)a + (Unsigned)b);
}
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
// sum + the numbers where x >= y.
inline Floats add_where(Floats sum, Floats x, Floats y, Floats numbers) { return sum + (x >= y ? numbers : Floats{}); }
inline float sum(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }
// The sums of kLanes vectors, each in its lane.
inline Floats sums(const Floats* x) { return Floats{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])}; }
inline bool has_nan(Floats x) { return std::isnan(sum(x)); }
inline int32_t sum(Ints x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float maximum(Floats x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats whole(Floats x) {
  const Floats shift = all(12582912.0f);  // 1.5 * 2^23 leaves no room for a fraction
  return (x + shift) - shift;
}
inline Ints round(Floats x) { return __builtin_convertvector(whole(x), Ints); }
inline void store_int8(int8_t* p, Ints x) {
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(x[i]);
}
inline void store_int16(int16_t* p, Ints x) {
  for (int i = 0; i < kLanes; ++i) p[i] = int16_t(x[i]);
}
inline Ints load(const int16_t* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(int16_t* p, Ints x) { std::memcpy(p, &x, sizeof x); }
// Two numbers of 16 bits in each lane.
inline Ints pairs(Ints first, Ints second) { return (first & 0xffff) | second << 16; }
// The sum of the products of two such.
inline Ints dot(Ints pairs, Ints others) {
  return (pairs << 16 >> 16) * (others << 16 >> 16) + (pairs >> 16) * (others >> 16);
}
// The first and the second of two bf16 in each lane.
inline Floats first_bf16(Ints pairs) { return (Floats)(pairs << 16); }
inline Floats second_bf16(Ints pairs) { return (Floats)(pairs & int32_t(0xffff0000)); }
inline Floats times_power_of_two(Floats x, Floats n) {  // 0 from n = -127 down, infinity from 128 up
  n = min(max(n, all(-127.0f)), all(128.0f));
  Ints bits = (round(n) + 127) << 23;
  return x * (Floats)bits;
}
inline Bytes low_nibbles(Bytes x) { return x & 15; }
inline Bytes high_nibbles(Bytes x) { return x >> 4; }

// sum + the product of 4 unsigned weights in each lane with the same 4 signed numbers.
template <int kBits>
inline Ints dot(Ints sum, Bytes weights, const int8_t* x) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) sum[i] += int(weights[4 * i + j]) * x[j];
  }
  return sum;
}

// sum + the products of the two numbers in each lane with the same two.
inline Ints dot(Ints sum, Ints pairs, const int16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return sum + dot(pairs, all(two));
}

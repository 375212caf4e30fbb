// NEON with dot products (Armv8.2): 4 lanes.
constexpr int kLanes = 4;
constexpr int kTileRows = 6, kBroadcasts = 8, kRegisters = 32;  // accumulators and operands fit
constexpr int kDenseRows = 6, kDenseWidth = kLanes;
using Floats = float32x4_t;
using Ints = int32x4_t;
using Bytes = uint8x16_t;
using InPairs = float;
using Rounded = int16_t;
constexpr bool kShortDots = false;

inline Floats load(const float* p) { return vld1q_f32(p); }
inline Floats load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
inline Floats load(const BFloat16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
inline Floats load(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline void store(float* p, Floats x) { vst1q_f32(p, x); }
inline void store(Half* p, Floats x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void store(BFloat16* p, Floats x) {  // to the nearest, ties to even
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  vst1_u16(&p->bits, vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16));
}
inline Floats held(Floats x) { return x; }
inline Floats all(float x) { return vdupq_n_f32(x); }
inline Ints all(int32_t x) { return vdupq_n_s32(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
inline Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
// sum + the numbers where x >= y.
inline Floats add_where(Floats sum, Floats x, Floats y, Floats numbers) {
  return vaddq_f32(sum, vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x, y), vreinterpretq_u32_f32(numbers))));
}
inline float sum(Floats x) { return vaddvq_f32(x); }
// The sums of kLanes vectors, each in its lane.
inline Floats sums(const Floats* x) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }
inline bool has_nan(Floats x) { return vminvq_u32(vceqq_f32(x, x)) == 0; }
inline int32_t sum(Ints x) { return vaddvq_s32(x); }
inline float maximum(Floats x) { return vmaxvq_f32(x); }
inline Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
inline Ints round(Floats x) { return vcvtnq_s32_f32(x); }
inline void store_int8(int8_t* p, Ints x) {
  const int16x4_t shorts = vqmovn_s32(x);
  const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(shorts, shorts))), 0);
  std::memcpy(p, &four, 4);
}
inline void store_int16(int16_t* p, Ints x) { vst1_s16(p, vqmovn_s32(x)); }
inline Ints load(const int16_t* p) { return vreinterpretq_s32_s16(vld1q_s16(p)); }
inline void store(int16_t* p, Ints x) { vst1q_s16(p, vreinterpretq_s16_s32(x)); }
// Two numbers of 16 bits in each lane.
inline Ints pairs(Ints first, Ints second) { return vsliq_n_s32(first, second, 16); }
// The sum of the products of two such.
inline Ints dot(Ints pairs, Ints others) {
  const int16x8_t x = vreinterpretq_s16_s32(pairs), y = vreinterpretq_s16_s32(others);
  return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
// The first and the second of two bf16 in each lane.
inline Floats first_bf16(Ints pairs) { return vreinterpretq_f32_s32(vshlq_n_s32(pairs, 16)); }
inline Floats second_bf16(Ints pairs) {
  return vreinterpretq_f32_s32(vandq_s32(pairs, vdupq_n_s32(int32_t(0xffff0000))));
}
inline Floats times_power_of_two(Floats x, Floats n) {  // 0 from n = -127 down, infinity from 128 up
  n = min(max(n, all(-127.0f)), all(128.0f));
  return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(add(round(n), all(127)), 23)));
}
inline Floats whole(Floats x) { return vrndnq_f32(x); }
inline Bytes low_nibbles(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
inline Bytes high_nibbles(Bytes x) { return vshrq_n_u8(x, 4); }

// sum + the product of 4 unsigned weights in each lane with the same 4 signed numbers.
template <int kBits>
inline Ints dot(Ints sum, Bytes weights, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const int8x16_t numbers = vreinterpretq_s8_s32(vdupq_n_s32(four));
  if constexpr (kBits == 4) return vdotq_s32(sum, vreinterpretq_s8_u8(weights), numbers);
  // The products are of signed numbers: weight = (weight - 128) - (-128).
  const int8x16_t signed_weights = vreinterpretq_s8_u8(veorq_u8(weights, vdupq_n_u8(128)));
  return vsubq_s32(vdotq_s32(sum, signed_weights, numbers), vdotq_s32(all(0), vdupq_n_s8(-128), numbers));
}

// sum + the products of the two numbers in each lane with the same two.
inline Ints dot(Ints sum, Ints pairs, const int16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return add(sum, dot(pairs, all(two)));
}

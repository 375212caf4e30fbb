// AVX2 with FMA and F16C, and AVX-VNNI if kVnni: 8 lanes.
constexpr int kLanes = 8;
// VNNI's dot product takes 5 cycles, and a processor begins two in each: 8 sums hide more of that than 4, though not all
// totals stay in registers (1.13 times the speed on an Emerald Rapids).
constexpr int kTileRows = kVnni ? 4 : 2, kBroadcasts = 4, kRegisters = 16;
constexpr int kDenseRows = 4, kDenseWidth = kGroup;
using Floats = __m256;
using Ints = __m256i;
using Bytes = __m256i;
using InPairs = float;
using Rounded = int16_t;
constexpr bool kShortDots = !kVnni;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load(const BFloat16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline Floats load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline void store(Half* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Floats x) {  // to the nearest, ties to even
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1)));
}
// x in a register: GCC would read it from memory again for each use, and loads are what is scarce.
inline Floats held(Floats x) {
  asm("" : "+x"(x));
  return x;
}
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Ints all(int32_t x) { return _mm256_set1_epi32(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
// sum + the numbers where x >= y.
inline Floats add_where(Floats sum, Floats x, Floats y, Floats numbers) {
  return _mm256_add_ps(sum, _mm256_and_ps(_mm256_cmp_ps(x, y, _CMP_GE_OQ), numbers));
}
inline float sum(Floats x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
// The sums of kLanes vectors, each in its lane.
inline Floats sums(const Floats* x) {
  const Floats a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const Floats b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
inline bool has_nan(Floats x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
inline int32_t sum(Ints x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
inline float maximum(Floats x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints round(Floats x) { return _mm256_cvtps_epi32(x); }
inline void store_int8(int8_t* p, Ints x) {
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(shorts, shorts));
}
inline void store_int16(int16_t* p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
inline Ints load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(int16_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
// Two numbers of 16 bits in each lane.
inline Ints pairs(Ints first, Ints second) { return _mm256_blend_epi16(first, _mm256_slli_epi32(second, 16), 0xaa); }
// The sum of the products of two such.
inline Ints dot(Ints pairs, Ints others) { return _mm256_madd_epi16(pairs, others); }
// The first and the second of two bf16 in each lane.
inline Floats first_bf16(Ints pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline Floats second_bf16(Ints pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000))));
}
inline Floats times_power_of_two(Floats x, Floats n) {  // 0 from n = -127 down, infinity from 128 up
  n = min(max(n, all(-127.0f)), all(128.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats whole(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }

// sum + the product of 4 unsigned weights in each lane with the same 4 signed numbers. Without VNNI, sums with 4-bit
// weights are two in each lane, of 16 bits, and 8-bit weights are taken minus 128.
template <int kBits>
inline Ints dot(Ints sum, Bytes weights, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i numbers = _mm256_set1_epi32(four);
  if constexpr (kVnni) {
    return _mm256_dpbusd_avx_epi32(sum, weights, numbers);
  } else if constexpr (kBits == 4) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, numbers));
  } else {
    // Two products fit 16 bits only if neither factor passes 128: the weights' signs go to the numbers.
    const __m256i less = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
    const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(less), _mm256_sign_epi8(numbers, less));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
  asm("" : "+x"(sum));  // one after the other: GCC adds in a tree, for which there are too few registers
  return sum;
}

// sum + the products of the two numbers in each lane with the same two.
inline Ints dot(Ints sum, Ints pairs, const int16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  if constexpr (kVnni) {
    return _mm256_dpwssd_avx_epi32(sum, pairs, all(two));
  } else {
    return add(sum, dot(pairs, all(two)));
  }
}

// AVX-512 with VNNI, and with products of bf16 if kBf16: 16 lanes.
constexpr int kLanes = 16;
constexpr int kTileRows = 6, kBroadcasts = 8, kRegisters = 32;  // accumulators and operands fit
constexpr int kDenseRows = 6, kDenseWidth = kLanes;
using Floats = __m512;
typedef int32_t Ints __attribute__((vector_size(64)));
using Bytes = __m512i;
using InPairs = std::conditional_t<kBf16, BFloat16, float>;
using Rounded = std::conditional_t<kAmx, int8_t, int16_t>;
constexpr bool kShortDots = false;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load(const BFloat16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline Floats load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(Half* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Floats x) {  // to the nearest, ties to even
  const Ints bits = (Ints)_mm512_castps_si512(x), up = bits + 0x7fff + ((bits >> 16) & 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)(up >> 16)));
}
inline Floats held(Floats x) { return x; }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Ints add(Ints a, Ints b) { return (Ints)_mm512_add_epi32((__m512i)a, (__m512i)b); }  // a + b must not overflow
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
// sum + the numbers where x >= y.
inline Floats add_where(Floats sum, Floats x, Floats y, Floats numbers) {
  return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ), sum, numbers);
}
inline int64_t keep_between(float* to, float* to_beside, Floats x, Floats beside, float low, float high) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x, all(low), _CMP_NLT_UQ) & _mm512_cmp_ps_mask(x, all(high), _CMP_NGE_UQ);
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(kept, x));
  _mm512_storeu_ps(to_beside, _mm512_maskz_compress_ps(kept, beside));
  return __builtin_popcount(kept);
}
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
// The sums of kLanes vectors, each in its lane.
inline Floats sums(const Floats* x) {
  Floats four[4];  // in each 128 bits, parts of the sums of 4 vectors
  UNROLL for (int i = 0; i < 4; ++i, x += 4) {
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]));
    const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]));
    four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  }
  const auto halves = [](Floats a, Floats b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}
inline bool has_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
inline int32_t sum(Ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
inline float maximum(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps((__m512i)x); }
inline Ints round(Floats x) { return (Ints)_mm512_cvtps_epi32(x); }
inline void store_int8(int8_t* p, Ints x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x)); }
inline void store_int16(int16_t* p, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
}
inline Ints load(const int16_t* p) { return (Ints)_mm512_loadu_si512(p); }
inline void store(int16_t* p, Ints x) { _mm512_storeu_si512(p, (__m512i)x); }
// Two numbers of 16 bits in each lane.
inline Ints pairs(Ints first, Ints second) {
  return (Ints)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)first, (__m512i)(second << 16));
}
// The sum of the products of two such.
inline Ints dot(Ints pairs, Ints others) { return (Ints)_mm512_madd_epi16((__m512i)pairs, (__m512i)others); }
// The first and the second of two bf16 in each lane.
inline Floats first_bf16(Ints pairs) { return (Floats)(pairs << 16); }
inline Floats second_bf16(Ints pairs) { return (Floats)(pairs & int32_t(0xffff0000)); }
inline Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline Floats whole(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }

// sum + the product of 4 unsigned weights in each lane with the same 4 signed numbers.
template <int kBits>
inline Ints dot(Ints sum, Bytes weights, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, weights, _mm512_set1_epi32(four));
}

// sum + the products of the two numbers in each lane with the same two.
inline Ints dot(Ints sum, Ints pairs, const int16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)pairs, _mm512_set1_epi32(two));
}

// sum + the products of the two bf16 in each lane with the same two, where kBf16.
inline Floats dot(Floats sum, Ints pairs, const BFloat16* x) {
  if constexpr (kBf16) {
    int32_t two;
    std::memcpy(&two, x, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(two));
  }
  return sum;
}

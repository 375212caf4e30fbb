// Where the weights of a row's largest numbers reach a sum.

// The number at a place in the order of all numbers of f32; NaN before and after the infinities.
inline float in_order(uint32_t place) {
  const uint32_t bits = place & 0x80000000u ? place ^ 0x80000000u : ~place;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The largest t for which the weights of numbers >= t sum to `need`, two bits at a time; -infinity if there is none.
inline float threshold(const float* x, const float* weights, int64_t count, float need) {
  constexpr int kTries = 3;
  constexpr int64_t kPart = 64;
  // Most parts soon have no number that is large enough.
  static thread_local std::vector<float> highest;
  highest.clear();
  for (int64_t begin = 0; begin < count; begin += kPart) {
    Floats most = all(-INFINITY);
    for (int64_t j = begin; j < std::min(begin + kPart, count); j += kLanes) {
      most = max(load_first(x + j, count - j), most);
    }
    highest.push_back(maximum(most));
  }
  uint32_t place = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    Floats total[kTries], least[kTries];
    for (int i = 0; i < kTries; ++i) {
      total[i] = all(0.0f);
      least[i] = all(in_order(place + (uint32_t(i + 1) << shift)));
    }
    for (int64_t begin = 0; begin < count; begin += kPart) {
      if (highest[begin / kPart] < in_order(place + (1u << shift))) continue;
      for (int64_t j = begin; j < std::min(begin + kPart, count); j += kLanes) {
        const Floats number = load_first(x + j, count - j), weight = load_first(weights + j, count - j);
        UNROLL for (int i = 0; i < kTries; ++i) total[i] = add_where(total[i], number, least[i], weight);
      }
    }
    uint32_t reached = 0;
    for (int i = 0; i < kTries; ++i) {
      if (sum(total[i]) >= need) reached = i + 1;
    }
    place += reached << shift;
  }
  return std::max(-INFINITY, in_order(place));
}

inline void thresholds(xla::ffi::ThreadPool& pool, const Ranking& r) {
  parallel_for(pool, r.rows, 1, [&](int64_t b) {
    r.found[b] = threshold(r.numbers + b * r.count, r.weights + b * r.count, r.count, r.need[b]);
  });
}

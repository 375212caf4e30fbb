// The products of queries [kRows, H] with the first keys of a cache's rows, whose lanes are not added up yet: products
// [kRows, kLanes], of which kTogether columns are filled. There are `count` keys; if fewer, the last one is repeated.
template <int kRows, class T>
inline void multiply(const float* queries, int64_t H, const T* keys, int64_t row_len, int64_t count, Floats* products) {
  const T* key[kTogether];
  Floats total[kTogether][kRows];
  UNROLL for (int j = 0; j < kTogether; ++j) {
    key[j] = keys + std::min<int64_t>(j, count - 1) * row_len;
    UNROLL for (int r = 0; r < kRows; ++r) total[j][r] = all(0.0f);
  }
  const auto add = [&](int64_t h, const auto& get) {
    Floats query[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) query[r] = get(queries + r * H + h);
    UNROLL for (int j = 0; j < kTogether; ++j) {
      const Floats part = get(key[j] + h);
      UNROLL for (int r = 0; r < kRows; ++r) total[j][r] = fma(query[r], part, total[j][r]);
    }
  };
  int64_t h = 0;
  for (; h + kLanes <= H; h += kLanes) add(h, [](const auto* p) { return load(p); });
  if (h < H) add(h, [&](const auto* p) { return load_first(p, H - h); });
  UNROLL for (int j = 0; j < kTogether; ++j) {
    UNROLL for (int r = 0; r < kRows; ++r) products[r * kLanes + j] = total[j][r];
  }
}

// scores [kRows, kKeys] of queries [kRows, H] and the first `count` keys of a cache's rows. The values, which are next,
// are fetched meanwhile.
template <int kRows, class T>
inline void score_stored(const float* queries, int64_t H, const T* keys, const T* values, int64_t row_len,
                         int64_t count, float* scores) {
  float steps[kKeys] = {};
  if constexpr (kSteps<T>) read_steps(keys, H, row_len, count, steps);
  Floats products[kRows * kLanes];
  std::fill_n(products, kRows * kLanes, all(0.0f));
  for (int64_t s = 0; s < count; s += kTogether) {
    for (int64_t h = 0; h < kTogether * row_len; h += kLine / sizeof(T)) {
      __builtin_prefetch(keys + (s + kAhead) * row_len + h);
      __builtin_prefetch(values + s * row_len + h);
    }
    const int64_t lane = s % kLanes;
    multiply<kRows>(queries, H, keys + s * row_len, row_len, count - s, products + lane);
    if (lane + kTogether == kLanes || s + kTogether >= count) {
      const Floats step = kSteps<T> ? load(steps + s - lane) : all(1.0f);
      UNROLL for (int r = 0; r < kRows; ++r) store(scores + r * kKeys + s - lane, sums(products + r * kLanes) * step);
    }
  }
}

// sums [kRows, H] = factor[r] * sums + weights [kRows, kKeys] times `count` values of a cache's rows, of kWide vectors
// from h on, or of one with less than kLanes numbers.
template <int kRows, int kWide, bool kWhole, class T>
inline void mix_part(const float* weights, const float* factor, const T* values, int64_t row_len, int64_t count,
                     int64_t H, int64_t h, float* sums) {
  const auto get = [&](const auto* p) { return kWhole ? load(p) : load_first(p, H - h); };
  Floats total[kRows][kWide];
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int i = 0; i < kWide; ++i) total[r][i] = get(sums + r * H + h + i * kLanes) * all(factor[r]);
  }
  for (int64_t s = 0; s < count; ++s) {
    Floats value[kWide];
    UNROLL for (int i = 0; i < kWide; ++i) value[i] = get(values + s * row_len + h + i * kLanes);
    UNROLL for (int r = 0; r < kRows; ++r) {
      const Floats weight = all(weights[r * kKeys + s]);
      UNROLL for (int i = 0; i < kWide; ++i) total[r][i] = fma(weight, value[i], total[r][i]);
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int i = 0; i < kWide; ++i) {
      if constexpr (kWhole) {
        store(sums + r * H + h + i * kLanes, total[r][i]);
      } else {
        store_first(sums + r * H + h, total[r][i], H - h);
      }
    }
  }
}

template <int kRows, int kWide, class T>
inline void mix(const float* weights, const float* factor, const T* values, int64_t row_len, int64_t count, int64_t H,
                float* sums) {
  const auto part = [&](auto wide, auto whole, int64_t h) {
    mix_part<kRows, wide, whole>(weights, factor, values, row_len, count, H, h, sums);
  };
  constexpr std::integral_constant<int, kWide> kMany;
  constexpr std::integral_constant<int, 1> kOne;
  int64_t h = 0;
  for (; h + kWide * kLanes <= H; h += kWide * kLanes) part(kMany, std::true_type(), h);
  for (; h + kLanes <= H; h += kLanes) part(kOne, std::true_type(), h);
  if (h < H) part(kOne, std::false_type(), h);
}

// kPiece positions of a sequence's cache, from `first` on, for one KV head. A query's pieces are done by any thread, and
// joined in their order: where the cache is cut does not depend on its length or on the number of threads.
struct Piece {
  int64_t b, k, first;
};
constexpr int64_t kPiece = 256;

// What pieces give of each head of the group: sums [H] of values by weights that are relative to the highest score,
// that score, and the weights' sum.
inline int64_t part_len(int64_t H) { return H + 2; }

// The query of kRows heads from `head` on, over a piece. Fills kRows parts.
template <int kRows, class T>
inline void attend_piece(const Attention<T>& a, const Piece& piece, int64_t head, float* parts) {
  const auto [b, k, first] = piece;
  const int64_t H = a.head_dim, end = std::min<int64_t>(a.start[b] + 1, first + kPiece);
  static thread_local std::vector<float> scratch;
  scratch.resize(2 * kRows * H);
  float *queries = scratch.data(), *sums = queries + kRows * H, scores[kRows * kKeys];
  Softmax<kRows> softmax;
  float most[softmax.kWhole] = {};
  std::fill(sums, sums + kRows * H, 0);
  const float scale = kLog2e / std::sqrt(float(H));  // scores are of powers of two
  for (int r = 0; r < kRows; ++r) rotate(a, b, 0, k * a.group() + head + r, scale, queries + r * H);
  for (int64_t s = first; s < end; s += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, end - s);
    const T *keys = a.row(a.keys, b, k, s), *values = a.row(a.values, b, k, s);
    score_stored<kRows>(queries, H, keys, values, a.row_len(), count, scores);
    for (int r = 0; r < kRows; ++r) most[r] = highest(scores + r * kKeys, count);
    softmax.go_on(most);
    for (int r = 0; r < kRows; ++r) {
      Floats total = all(0.0f);
      for (float* at = scores + r * kKeys; at < scores + (r + 1) * kKeys; at += kLanes) {
        const Floats weight = exp2(load(at) - all(softmax.highest[r]));
        store(at, weight);
        total = total + weight;
      }
      softmax.add(r, total);
    }
    if constexpr (kSteps<T>) {
      float steps[kKeys] = {};
      read_steps(values, H, a.row_len(), count, steps);
      for (int i = 0; i < kRows * kKeys; i += kLanes) store(scores + i, load(scores + i) * load(steps + i % kKeys));
    }
    mix<kRows, 4>(scores, softmax.factor, values, a.row_len(), count, H, sums);
  }
  for (int r = 0; r < kRows; ++r, parts += part_len(H)) {
    std::copy_n(sums + r * H, H, parts);
    parts[H] = softmax.highest[r];
    parts[H + 1] = softmax.sum_of(r);
  }
}

template <class T, int kRows = 4>
inline void attend_group(const Attention<T>& a, const Piece& piece, float* parts) {
  if constexpr (kRows > 1) {
    if (a.group() % kRows != 0) return attend_group<T, kRows - 1>(a, piece, parts);
  }
  for (int64_t head = 0; head < a.group(); head += kRows) {
    attend_piece<kRows>(a, piece, head, parts + head * part_len(a.head_dim));
  }
}

// The mixed values of a KV head's group, from the parts of `count` pieces.
template <class T>
inline void join(const Attention<T>& a, int64_t b, int64_t k, const float* parts, int64_t count) {
  const int64_t H = a.head_dim, stride = a.group() * part_len(H);
  for (int64_t g = 0; g < a.group(); ++g, parts += part_len(H)) {
    float *out = a.out + (b * a.heads + k * a.group() + g) * H, most = kLowest;
    for (const float* part = parts; part < parts + count * stride; part += stride) most = std::max(most, part[H]);
    Floats total = all(0.0f);
    std::fill_n(out, H, 0);
    for (const float* part = parts; part < parts + count * stride; part += stride) {
      const Floats factor = exp2(all(part[H] - most));
      total = fma(factor, all(part[H + 1]), total);
      for (int64_t h = 0; h < H; h += kLanes) {
        store_first(out + h, fma(factor, load_first(part + h, H - h), load_first(out + h, H - h)), H - h);
      }
    }
    for (int64_t h = 0; h < H; h += kLanes) store_first(out + h, load_first(out + h, H - h) / total, H - h);
  }
}

// One query of each sequence.
template <class T>
inline void attend_one(xla::ffi::ThreadPool& pool, const Attention<T>& a) {
  struct Scratch {
    std::vector<Piece> pieces;
    std::vector<int64_t> left;  // of each KV head, the pieces that are not done
    std::vector<float> parts;   // [pieces, group, part_len]
  };
  static thread_local Scratch scratch;
  auto& [pieces, left, parts] = scratch;
  pieces.clear();
  left.clear();
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t k = 0; k < a.kv_heads; ++k) {
      left.push_back(a.start[b] / kPiece + 1);
      for (int64_t first = 0; first <= a.start[b]; first += kPiece) pieces.push_back({b, k, first});
    }
  }
  const int64_t length = a.group() * part_len(a.head_dim);
  parts.resize(pieces.size() * length);
  // These arrays are the calling thread's, in all threads.
  parallel_for(pool, pieces.size(), 1, [&, pieces = pieces.data(), left = left.data(), parts = parts.data()](int64_t i) {
    const auto [b, k, first] = pieces[i];
    const int64_t number = first / kPiece, last = a.start[b] / kPiece;
    if (number == last) write(a, b, k, 0);
    attend_group(a, pieces[i], parts + i * length);
    if (__atomic_sub_fetch(&left[b * a.kv_heads + k], 1, __ATOMIC_ACQ_REL) == 0) {
      join(a, b, k, parts + (i - number) * length, last + 1);
    }
  });
}

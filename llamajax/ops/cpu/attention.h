// Causal attention of grouped queries over a KV cache, with an online softmax (Milakov and Gimelshein 2018) over
// blocks of kKeys positions. A query's sums are in the same order whatever stands beside it.

// RoPE: the pairs (x[i], x[i + head_dim / 2]) of a head of query t, turned by its angles, times a factor.
template <class T>
inline void rotate(const Attention<T>& a, int64_t b, int64_t t, int64_t head, float factor, float* y) {
  const int64_t half = a.head_dim / 2, angles = (b * a.queries + t) * half;
  const float *x = a.head(b, t, head), *cos = a.cos + angles, *sin = a.sin + angles;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = (x[i] * cos[i] - x[i + half] * sin[i]) * factor;
    y[i + half] = (x[i + half] * cos[i] + x[i] * sin[i]) * factor;
  }
}

// Puts the key and the value of query t into the cache.
template <class T>
inline void write(const Attention<T>& a, int64_t b, int64_t k, int64_t t) {
  static thread_local std::vector<float> rotated;
  rotated.resize(a.head_dim);
  rotate(a, b, t, a.heads + k, 1, rotated.data());
  const float* value = a.head(b, t, a.heads + a.kv_heads + k);
  T *to_key = a.row(a.keys, b, k, a.start[b] + t), *to_value = a.row(a.values, b, k, a.start[b] + t);
  for (int64_t h = 0; h < a.head_dim; ++h) {
    to_key[h] = narrow<T>(rotated[h]);
    to_value[h] = narrow<T>(value[h]);
  }
}

// scores [kRows, kKeys] of queries [kRows, H] and keys that are stored [H, kKeys].
template <int kRows>
inline void score_transposed(const float* queries, int64_t H, const float* keys, float* scores) {
  for (int j = 0; j < kKeys; j += 2 * kLanes) {
    Floats total[kRows][2];
    UNROLL for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = all(0.0f);
    for (int64_t h = 0; h < H; ++h) {
      const Floats first = load(keys + h * kKeys + j), second = load(keys + h * kKeys + j + kLanes);
      UNROLL for (int r = 0; r < kRows; ++r) {
        const Floats query = all(queries[r * H + h]);
        total[r][0] = fma(query, first, total[r][0]);
        total[r][1] = fma(query, second, total[r][1]);
      }
    }
    UNROLL for (int r = 0; r < kRows; ++r) {
      store(scores + r * kKeys + j, total[r][0]);
      store(scores + r * kKeys + j + kLanes, total[r][1]);
    }
  }
}

// scores [kRows, kKeys] of queries [kRows, H] and the first `count` keys [H] of a cache. The values, which are next,
// are fetched meanwhile.
template <int kRows, class T>
inline void score_stored(const float* queries, int64_t H, const T* keys, const T* values, int64_t count, float* scores) {
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t h = 0; h < H; h += 64 / sizeof(T)) {
      __builtin_prefetch(keys + (s + kAhead) * H + h);
      __builtin_prefetch(values + s * H + h);
    }
    Floats total[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) total[r] = all(0.0f);
    int64_t h = 0;
    for (; h + kLanes <= H; h += kLanes) {
      const Floats key = load(keys + s * H + h);
      UNROLL for (int r = 0; r < kRows; ++r) total[r] = fma(load(queries + r * H + h), key, total[r]);
    }
    if (h < H) {
      const Floats key = load_first(keys + s * H + h, H - h);
      UNROLL for (int r = 0; r < kRows; ++r) total[r] = fma(load_first(queries + r * H + h, H - h), key, total[r]);
    }
    UNROLL for (int r = 0; r < kRows; ++r) scores[r * kKeys + s] = sum(total[r]);
  }
}

// sums [kRows, H] = factor[r] * sums + weights [kRows, kKeys] times `count` values [H] of a cache, of kWide vectors
// from h on, or of one with less than kLanes numbers.
template <int kRows, int kWide, bool kWhole, class T>
inline void mix_part(const float* weights, const float* factor, const T* values, int64_t count, int64_t H, int64_t h,
                     float* sums) {
  const auto get = [&](const auto* p) { return kWhole ? load(p) : load_first(p, H - h); };
  Floats total[kRows][kWide];
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int i = 0; i < kWide; ++i) total[r][i] = get(sums + r * H + h + i * kLanes) * all(factor[r]);
  }
  for (int64_t s = 0; s < count; ++s) {
    Floats value[kWide];
    UNROLL for (int i = 0; i < kWide; ++i) value[i] = get(values + s * H + h + i * kLanes);
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
inline void mix(const float* weights, const float* factor, const T* values, int64_t count, int64_t H, float* sums) {
  int64_t h = 0;
  for (; h + kWide * kLanes <= H; h += kWide * kLanes) mix_part<kRows, kWide, true>(weights, factor, values, count, H, h, sums);
  for (; h + kLanes <= H; h += kLanes) mix_part<kRows, 1, true>(weights, factor, values, count, H, h, sums);
  if (h < H) mix_part<kRows, 1, false>(weights, factor, values, count, H, h, sums);
}

// One row's scores to weights relative to its highest score so far; those from `count` on to 0.
inline void soften(float* scores, int64_t count, float& highest, float& total, float& factor) {
  factor = 1;
  if (count > 0) {
    std::fill(scores + count, scores + kKeys, kLowest);
    Floats most = all(highest), weight_sum = all(0.0f);
    for (int64_t j = 0; j < count; j += kLanes) most = max(most, load(scores + j));
    const float next = maximum(most);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Floats weight = exp(load(scores + j) - all(next));
      store(scores + j, weight);
      weight_sum = weight_sum + weight;
    }
    factor = std::exp(highest - next);
    total = total * factor + sum(weight_sum);
    highest = next;
  }
  std::fill(scores + std::max<int64_t>(count, 0), scores + kKeys, 0);
}

// Rows first .. first + kRows of a KV head's queries (row = query * group + head of the group), those there are.
// Keys stand transposed, [block, H, kKeys], or as the cache has them if `transposed` is null.
template <int kRows, int kWide, class T>
inline void attend(const Attention<T>& a, int64_t b, int64_t k, int64_t first, const float* transposed) {
  const int64_t H = a.head_dim, group = a.group(), rows = std::min<int64_t>(kRows, a.queries * group - first);
  static thread_local std::vector<float> scratch;
  scratch.resize(kRows * (2 * H + kKeys));
  float *queries = scratch.data(), *sums = queries + kRows * H, *scores = sums + kRows * H;
  std::fill(queries, scores, 0);
  float highest[kRows], total[kRows] = {}, factor[kRows];
  int64_t position[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t t = (first + std::min<int64_t>(r, rows - 1)) / group, g = (first + r) % group;
    position[r] = a.start[b] + t;
    highest[r] = kLowest;
    if (r < rows) rotate(a, b, t, k * group + g, 1 / std::sqrt(float(H)), queries + r * H);
  }
  for (int64_t s = 0; s <= position[kRows - 1]; s += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, position[kRows - 1] + 1 - s);
    if (transposed) {
      score_transposed<kRows>(queries, H, transposed + s * H, scores);
    } else {
      score_stored<kRows>(queries, H, a.row(a.keys, b, k, s), a.row(a.values, b, k, s), count, scores);
    }
    for (int r = 0; r < kRows; ++r) {
      soften(scores + r * kKeys, std::min<int64_t>(kKeys, position[r] + 1 - s), highest[r], total[r], factor[r]);
    }
    mix<kRows, kWide>(scores, factor, a.row(a.values, b, k, s), count, H, sums);
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t t = (first + r) / group, g = (first + r) % group;
    float* out = a.out + ((b * a.queries + t) * a.heads + k * group + g) * H;
    for (int64_t h = 0; h < H; ++h) out[h] = sums[r * H + h] / total[r];
  }
}

// One query of each head of a group.
template <class T, int kRows = 4>
inline void attend_one(const Attention<T>& a, int64_t b, int64_t k) {
  if constexpr (kRows > 1) {
    if (a.group() % kRows != 0) return attend_one<T, kRows - 1>(a, b, k);
  }
  for (int64_t first = 0; first < a.group(); first += kRows) attend<kRows, 4>(a, b, k, first, nullptr);
}

template <class T>
inline void attention(xla::ffi::ThreadPool& pool, const Attention<T>& a) {
  const int64_t B = a.batch, K = a.kv_heads, H = a.head_dim, rows = a.queries * a.group();
  if (a.queries == 1) {
    parallel_for(pool, B * K, 1, [&](int64_t i) {
      const int64_t b = i / K, k = i % K;
      write(a, b, k, 0);
      attend_one(a, b, k);
    });
    return;
  }
  int64_t blocks = 0;  // of keys, in the longest sequence
  for (int64_t b = 0; b < B; ++b) blocks = std::max<int64_t>(blocks, (a.start[b] + a.queries + kKeys - 1) / kKeys);
  static thread_local std::vector<float> transposed_scratch;
  transposed_scratch.resize(B * K * blocks * kKeys * H);
  float* transposed = transposed_scratch.data();
  parallel_for(pool, B * K * blocks, 1, [&](int64_t i) {
    const int64_t b = i / (K * blocks), k = i / blocks % K, s = i % blocks * kKeys, end = a.start[b] + a.queries;
    for (int64_t t = std::max<int64_t>(s - a.start[b], 0); t < std::min<int64_t>(s + kKeys - a.start[b], a.queries); ++t) {
      write(a, b, k, t);
    }
    float* block = transposed + ((b * K + k) * blocks * kKeys + s) * H;
    for (int64_t j = 0; j < kKeys; ++j) {
      const T* key = a.row(a.keys, b, k, s + j);
      for (int64_t h = 0; h < H; ++h) block[h * kKeys + j] = s + j < end ? widen(key[h]) : 0;
    }
  });
  const int64_t tiles = (rows + kQueries - 1) / kQueries;
  parallel_for(pool, B * K * tiles, 1, [&](int64_t i) {
    const int64_t b = i / (K * tiles), k = i / tiles % K, tile = tiles - 1 - i % tiles;  // the longest first
    attend<kQueries, 2>(a, b, k, tile * kQueries, transposed + (b * K + k) * blocks * kKeys * H);
  });
}

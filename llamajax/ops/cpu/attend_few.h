// How many keys, or vectors of a value, are multiplied with kRows queries or weights at once: their accumulators, the
// kRows operands and one more fit the registers.
template <int kRows>
constexpr int kTogether = 5 * kRows + 1 <= kRegisters ? 4 : 2;

// Products of queries [kRows, H] with the next `together` keys of a page, before their lanes are summed: products
// [kRows, kLanes], of which `together` columns are filled. If fewer keys are left (`count`), the last one is repeated, so
// that the loop has no branches.
template <int kRows, class T>
inline void multiply(const float* queries, int64_t H, const T* keys, int64_t row_len, int64_t count, Floats* products) {
  constexpr int together = kTogether<kRows>;
  const T* key[together];
  Floats total[together][kRows];
  UNROLL for (int j = 0; j < together; ++j) {
    key[j] = keys + std::min<int64_t>(j, count - 1) * row_len;
    UNROLL for (int r = 0; r < kRows; ++r) total[j][r] = all(0.0f);
  }
  const auto add = [&](int64_t h, const auto& get) {
    Floats query[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) query[r] = held(get(queries + r * H + h));
    UNROLL for (int j = 0; j < together; ++j) {
      const Floats part = get(key[j] + h);
      UNROLL for (int r = 0; r < kRows; ++r) total[j][r] = fma(query[r], part, total[j][r]);
    }
  };
  int64_t h = 0;
  for (; h + kLanes <= H; h += kLanes) add(h, [](const auto* p) { return load(p); });
  if (h < H) add(h, [&](const auto* p) { return load_first(p, H - h); });
  UNROLL for (int j = 0; j < together; ++j) {
    UNROLL for (int r = 0; r < kRows; ++r) products[r * kLanes + j] = total[j][r];
  }
}

// Fetches `count` numbers into the first-level cache.
template <class T>
inline void fetch(const T* numbers, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine / sizeof(T)) __builtin_prefetch(numbers + i);
}

// scores [kRows, kKeys] of queries [kRows, H] and the first `count` keys of a page. Prefetches the page's values,
// which `mix` needs next.
template <int kRows, class T>
inline void score_stored(const float* queries, int64_t H, const T* keys, const T* values, int64_t row_len,
                         int64_t count, float* scores) {
  float steps[kKeys] = {};
  if constexpr (kSteps<T>) read_steps(keys, H, row_len, count, steps);
  Floats products[kRows * kLanes];  // whose last lanes hold anything: `highest` replaces the scores of no key
  for (int64_t s = 0; s < count; s += kTogether<kRows>) {
    fetch(values + s * row_len, kTogether<kRows> * row_len);
    const int64_t lane = s % kLanes;
    multiply<kRows>(queries, H, keys + s * row_len, row_len, count - s, products + lane);
    if (lane + kTogether<kRows> == kLanes || s + kTogether<kRows> >= count) {
      const Floats step = kSteps<T> ? load(steps + s - lane) : all(1.0f);
      UNROLL for (int r = 0; r < kRows; ++r) store(scores + r * kKeys + s - lane, sums(products + r * kLanes) * step);
    }
  }
}

// sums [kRows, H] = factor[r] * sums + weights [kRows, kKeys] times `count` values of a page. Does kWide vectors of
// the head from h on, or, unless kWhole, one with less than kLanes numbers. Prefetches the keys of the next page.
template <int kRows, int kWide, bool kWhole, class T>
inline void mix_part(const float* weights, const float* factor, const T* values, const T* next_keys, int64_t row_len,
                     int64_t count, int64_t H, int64_t h, float* sums) {
  const auto get = [&](const auto* p) { return kWhole ? load(p) : load_first(p, H - h); };
  Floats total[kRows][kWide];
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int i = 0; i < kWide; ++i) total[r][i] = get(sums + r * H + h + i * kLanes) * all(factor[r]);
  }
  for (int64_t s = 0; s < count; ++s) {
    fetch(next_keys + h * kKeys + s * kWide * kLanes, kWide * kLanes);
    Floats weight[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) weight[r] = all(weights[r * kKeys + s]);
    UNROLL for (int i = 0; i < kWide; ++i) {
      const Floats value = get(values + s * row_len + h + i * kLanes);
      UNROLL for (int r = 0; r < kRows; ++r) total[r][i] = fma(weight[r], value, total[r][i]);
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
inline void mix(const float* weights, const float* factor, const T* values, const T* next_keys, int64_t row_len,
                int64_t count, int64_t H, float* sums) {
  const auto part = [&](auto wide, auto whole, int64_t h) {
    mix_part<kRows, wide, whole>(weights, factor, values, next_keys, row_len, count, H, h, sums);
  };
  constexpr std::integral_constant<int, kWide> kMany;
  constexpr std::integral_constant<int, 1> kOne;
  int64_t h = 0;
  for (; h + kWide * kLanes <= H; h += kWide * kLanes) part(kMany, std::true_type(), h);
  for (; h + kLanes <= H; h += kLanes) part(kOne, std::true_type(), h);
  if (h < H) part(kOne, std::false_type(), h);
}

// A unit of work for a thread: kPiece positions of a sequence's cache, from `first` on, for one KV head. Any thread
// may do a query's pieces; they are joined in order. The cache is cut at the same positions whatever its length and
// the number of threads, so that a sum has the same bits.
struct Piece {
  int64_t b, k, first;
};
constexpr int64_t kPiece = 256;

// Where the first piece begins that query t sees.
template <class T>
inline int64_t first_piece(const Attention<T>& a, int64_t b, int64_t t) {
  return a.first_seen(b, t) / kPiece * kPiece;
}

// A piece's result for each head of the group: the weighted sum of values [H], the highest score, to which the
// weights are relative, and the sum of the weights.
inline int64_t part_len(int64_t H) { return H + 2; }

// Query t of kRows heads from `head` on, over a piece. Fills kRows parts. `next` is where the next piece's keys begin.
template <int kRows, class T>
inline void attend_piece(const Attention<T>& a, const Piece& piece, const T* next, int64_t t, int64_t head,
                         float* parts) {
  const auto [b, k, first] = piece;
  const int64_t H = a.head_dim, end = std::min(a.start[b] + t + 1, first + kPiece), seen = a.first_seen(b, t);
  static thread_local std::vector<float> scratch;
  scratch.resize(2 * kRows * H);
  float *queries = scratch.data(), *sums = queries + kRows * H, scores[kRows * kKeys];
  Softmax<kRows> softmax;
  float most[softmax.kWhole] = {};
  std::fill(sums, sums + kRows * H, 0);
  const float scale = kLog2e / std::sqrt(float(H));  // the softmax uses 2^x, which is cheaper than e^x
  for (int r = 0; r < kRows; ++r) rotate(a, b, t, k * a.group() + head + r, scale, queries + r * H);
  for (int64_t s = std::max(first, seen / kKeys * kKeys); s < end; s += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, end - s);
    const T *keys = a.row(a.keys, b, k, s), *values = a.row(a.values, b, k, s);
    score_stored<kRows>(queries, H, keys, values, a.row_len(), count, scores);
    for (int r = 0; r < kRows; ++r) most[r] = highest(scores + r * kKeys, seen - s, count);
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
    const T* next_keys = s + kKeys < end ? a.row(a.keys, b, k, s + kKeys) : next;
    mix<kRows, kTogether<kRows>>(scores, softmax.factor, values, next_keys, a.row_len(), count, H, sums);
  }
  for (int r = 0; r < kRows; ++r, parts += part_len(H)) {
    std::copy_n(sums + r * H, H, parts);
    parts[H] = softmax.highest[r];
    parts[H + 1] = softmax.sum_of(r);
  }
}

template <class T, int kRows = 4>
inline void attend_group(const Attention<T>& a, const Piece& piece, const T* next, int64_t t, float* parts) {
  if constexpr (kRows > 1) {
    if (a.group() % kRows != 0) return attend_group<T, kRows - 1>(a, piece, next, t, parts);
  }
  for (int64_t head = 0; head < a.group(); head += kRows) {
    attend_piece<kRows>(a, piece, next, t, head, parts + head * part_len(a.head_dim));
  }
}

// The mixed values of query t for a KV head's group, from the parts of the `count` pieces that it sees.
template <class T>
inline void join(const Attention<T>& a, int64_t b, int64_t k, int64_t t, const float* parts, int64_t stride,
                 int64_t count) {
  const int64_t H = a.head_dim;
  for (int64_t g = 0; g < a.group(); ++g, parts += part_len(H)) {
    float *out = a.out + ((b * a.queries + t) * a.heads + k * a.group() + g) * H, most = kLowest;
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

// Attention of few queries of each sequence. Each gets the same bits as if it were alone; they share only the reading
// of a piece's keys and values, which stay in a core's second-level cache.
template <class T>
inline void attend_few(xla::ffi::ThreadPool& pool, const Attention<T>& a) {
  struct Scratch {
    std::vector<Piece> pieces;  // a sequence's, of all KV heads, one after the other: their pages are neighbours
    std::vector<int64_t> left;  // unfinished pieces of each KV head
    std::vector<float> parts;   // [pieces, queries, group, part_len]
  };
  static thread_local Scratch scratch;
  auto& [pieces, left, parts] = scratch;
  pieces.clear();
  left.clear();
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t begin = first_piece(a, b, 0);
    left.insert(left.end(), a.kv_heads, (a.end(b) - begin + kPiece - 1) / kPiece);
    for (int64_t first = begin; first < a.end(b); first += kPiece) {
      for (int64_t k = 0; k < a.kv_heads; ++k) pieces.push_back({b, k, first});
    }
  }
  const int64_t Q = a.queries, K = a.kv_heads, count = pieces.size(), length = a.group() * part_len(a.head_dim);
  parts.resize(count * Q * length);
  // References to the calling thread's arrays: in another thread, `scratch` would be that thread's own.
  parallel_for(pool, count, 1, [&, pieces = pieces.data(), left = left.data(), parts = parts.data()](int64_t i) {
    const auto [b, k, first] = pieces[i];
    const Piece& next = pieces[std::min(i + 1, count - 1)];
    const int64_t start = a.start[b], begin = first_piece(a, b, 0), number = (first - begin) / kPiece;
    const int64_t end = std::min(first + kPiece, a.end(b));
    for (int64_t s = std::max(start, first); s < end; ++s) write(a, b, k, s - start);
    for (int64_t t = std::max<int64_t>(first - start, 0); t < Q && a.first_seen(b, t) < end; ++t) {
      attend_group(a, pieces[i], a.row(a.keys, next.b, next.k, next.first), t, parts + (i * Q + t) * length);
    }
    if (__atomic_sub_fetch(&left[b * K + k], 1, __ATOMIC_ACQ_REL) == 0) {
      for (int64_t t = 0; t < Q; ++t) {
        const int64_t from = first_piece(a, b, t), before = (from - begin) / kPiece;
        join(a, b, k, t, parts + ((i + (before - number) * K) * Q + t) * length, K * Q * length,
             (start + t - from) / kPiece + 1);
      }
    }
  });
}

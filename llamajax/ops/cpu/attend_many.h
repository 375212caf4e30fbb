// Attention of many queries, for prefill. Each vector lane holds one query, so that the softmax needs no sums across
// lanes. Prefill repacks the cache into blocks of kKeys positions, in the order in which the products read them.
//
// A product multiplies a left operand [rows, depth] (keys or values) by a right operand [depth / kPer, kColumns,
// kPer], with one query per column. With a cache in f32, both are in f32. Otherwise both are rounded to 12 bits, so
// that sums fit 32: a query or a key to multiples of its largest magnitude / kFine, values to the same of their
// dimension in the block, and weights to multiples of the block's largest / kWeight.
constexpr int32_t kFine = 4095, kWeight = 8191;
constexpr int kColumns = 2 * kLanes;
static_assert(int64_t(kFine) * kWeight * kKeys <= INT32_MAX);

// The numbers of an operand: f32, int16, or AMX's bytes, with the high bytes in one plane and the low ones in
// another.
template <class T>
using Number = std::conditional_t<std::is_same_v<T, float>, float, Rounded>;
template <class N>
using Exact = decltype(all(std::conditional_t<sizeof(N) == 4, float, int32_t>()));  // numbers, or sums of products
template <class N>
constexpr int kPer = 4 / sizeof(N);
template <class N>
constexpr int64_t kPlanes = sizeof(N) == 1 ? 2 : 1;

template <class N>
inline Exact<N> exact(Floats x) {
  if constexpr (std::is_same_v<N, float>) {
    return x;
  } else {
    return round(x);
  }
}

// The products of operands in f32 and int16. amx.h has the ones of bytes. AMX's tiles are set up while one exists.
template <class N>
struct Operands {
  // Puts numbers of a row, or of as many rows as share a lane. Planes are `plane` numbers apart.
  static void put(Exact<N> x, N* p, int64_t) {
    if constexpr (std::is_same_v<N, float>) {
      store(p, x);
    } else {
      store_int16(p, x);
    }
  }
  static void put_together(const Exact<N>* x, N* p, int64_t) {
    if constexpr (std::is_same_v<N, float>) {
      store(p, x[0]);
    } else {
      store(p, pairs(x[0], x[1]));
    }
  }

  // The product of operands [rows, depth] and [depth / kPer, kColumns, kPer]: calls at(row, i, sums) for each row and
  // the i-th vector of columns.
  template <class At>
  static void multiply(const N* left, const N* right, int64_t rows, int64_t depth, const At& at) {
    for (int64_t row = 0; row < rows; row += kBroadcasts, left += kBroadcasts * depth) {
      Exact<N> total[kBroadcasts][2];
      UNROLL for (int r = 0; r < kBroadcasts; ++r) total[r][0] = total[r][1] = exact<N>(all(0.0f));
      for (int64_t d = 0; d < depth; d += kPer<N>) {
        const auto first = load(right + d * kColumns), second = load(right + d * kColumns + kPer<N> * kLanes);
        UNROLL for (int r = 0; r < kBroadcasts; ++r) {
          total[r][0] = dot(total[r][0], first, left + r * depth + d);
          total[r][1] = dot(total[r][1], second, left + r * depth + d);
        }
      }
      UNROLL for (int r = 0; r < kBroadcasts; ++r) {
        at(row + r, 0, total[r][0]);
        at(row + r, 1, total[r][1]);
      }
    }
  }
};

// A block of keys and values. `width` is head_dim, padded with zeros to a multiple of what the products take.
template <class N>
struct Block {
  N *keys, *values;                // [kPlanes, kKeys, width], [kPlanes, width, kKeys]
  float *key_steps, *value_steps;  // [kKeys], [width]
  float* nothing;                  // 0, or NaN if a key is not finite, which rounding would lose
};

// Blocks of all sequences and KV heads.
template <class N>
struct Blocks {
  int64_t width;
  N* numbers;
  std::vector<N> room;
  std::vector<float> steps;

  void resize(int64_t count, int64_t H) {
    constexpr int64_t kUnit = kPlanes<N> == 2 ? kKeys : kLanes;
    width = (H + kUnit - 1) / kUnit * kUnit;
    numbers = in_lines(room, 2 * count * kPlanes<N> * kKeys * width);
    steps.resize(count * (kKeys + width + 1));
  }
  Block<N> operator[](int64_t i) {
    const int64_t size = kPlanes<N> * kKeys * width;
    N* keys = numbers + 2 * i * size;
    float* key_steps = steps.data() + i * (kKeys + width + 1);
    return {keys, keys + size, key_steps, key_steps + kKeys, key_steps + kKeys + width};
  }
};

// The first `count` of x and zeros, `width` in all, as multiples of their largest magnitude / `most` if they are
// rounded. Returns the step.
template <class T, class N>
inline float narrow_row(const T* x, int64_t count, int64_t width, float most, N* y, int64_t plane) {
  float step = 1;
  if constexpr (!std::is_same_v<N, float>) step = std::max(largest(x, count) / most, 1e-20f);  // or NaN
  const Floats inverse = all(1 / step);
  for (int64_t i = 0; i < width; i += kLanes) Operands<N>::put(exact<N>(load_first(x + i, count - i) * inverse), y + i, plane);
  return step;
}

// Makes a block of the keys and values of the positions from s on, of which there are `count`.
template <class T, class N>
inline void pack(const Attention<T>& a, int64_t b, int64_t k, int64_t s, int64_t count, int64_t width,
                 const Block<N>& block) {
  const int64_t H = a.head_dim, plane = kKeys * width;
  const T *keys = a.row(a.keys, b, k, s), *values = a.row(a.values, b, k, s);
  float key_steps[kKeys] = {}, value_steps[kKeys] = {};
  if constexpr (kSteps<T>) {
    read_steps(keys, H, a.row_len(), count, key_steps);
    read_steps(values, H, a.row_len(), count, value_steps);
  }
  *block.nothing = 0;
  for (int64_t j = 0; j < kKeys; ++j) {
    float& step = block.key_steps[j];
    step = narrow_row(keys + j * a.row_len(), j < count ? H : 0, width, kFine, block.keys + j * width, plane);
    if (kSteps<T>) step *= key_steps[j];
    *block.nothing += 0 * step;
  }
  for (int64_t h = 0; h < width; h += kLanes) {
    Floats part[kKeys], largest = all(0.0f), nothing = all(0.0f), inverse = all(1.0f);
    for (int64_t j = 0; j < kKeys; ++j) {
      part[j] = load_first(values + j * a.row_len() + h, j < count ? H - h : 0);
      if (kSteps<T>) part[j] = part[j] * all(value_steps[j]);
      largest = max(largest, max(part[j], -part[j]));
      nothing = fma(part[j], all(0.0f), nothing);  // or NaN
    }
    store(block.value_steps + h, inverse);
    if constexpr (!std::is_same_v<N, float>) {
      inverse = all(float(kFine)) / max(largest, all(1e-30f));
      store(block.value_steps + h, fma(largest, all(1.0f / kFine), nothing));
    }
    for (int64_t j = 0; j < kKeys; j += kPer<N>) {
      Exact<N> together[kPer<N>];
      N lanes[kPlanes<N>][kLanes][kPer<N>];
      UNROLL for (int i = 0; i < kPer<N>; ++i) together[i] = exact<N>(part[j + i] * inverse);
      Operands<N>::put_together(together, lanes[0][0], kLanes * kPer<N>);
      for (int64_t p = 0; p < kPlanes<N>; ++p) {
        UNROLL for (int i = 0; i < kLanes; ++i) {
          std::memcpy(block.values + p * plane + (h + i) * kKeys + j, lanes[p][i], sizeof lanes[p][i]);
        }
      }
    }
  }
}

// What one tile of queries computes from one block.
template <class N>
struct Work {
  alignas(kLine) float scores[kKeys * kColumns];
  alignas(kLine) N weights[kPlanes<N> * kKeys * kColumns];  // a right operand
  float factor[kColumns];  // by which the sums so far are scaled down
  float share[kColumns];   // the step of this block's rounded weights
};

// kColumns rows of a KV head's queries (row = query * group + head of the group), from block to block.
template <class T, class N>
class Tile {
 public:
  // Loads the rows from `first` on. Repeats the last one if fewer are left.
  void begin(const Attention<T>& a, int64_t b, int64_t k, int64_t first, int64_t width) {
    const int64_t H = a.head_dim, group = a.group(), rows = a.queries * group, plane = width * kColumns;
    const float finest = std::min<float>(kFine, INT32_MAX / kFine / H);
    queries_ = in_lines(room_of_queries_, kPlanes<N> * plane);
    sums_ = in_lines(room_of_sums_, plane);
    narrowed_.resize(kPlanes<N> * width);
    rotated_.resize(H);
    std::fill_n(sums_, plane, 0);
    for (int r = 0; r < kColumns; ++r) {
      const int64_t row = std::min(first + r, rows - 1), t = row / group;
      end_[r] = a.start[b] + t + 1;
      before_[r] = a.first_seen(b, t) - 1;
      rotate(a, b, t, k * group + row % group, kLog2e / std::sqrt(float(H)), rotated_.data());
      query_steps_[r] = narrow_row(rotated_.data(), H, width, finest, narrowed_.data(), width);
      for (int64_t i = 0; i < kPlanes<N> * width; i += kPer<N>) {
        std::copy_n(&narrowed_[i], kPer<N>, &queries_[i * kColumns + r * kPer<N>]);
      }
    }
    std::fill_n(highest_, kColumns, kLowest);
    std::fill_n(total_, kColumns, 0);
  }

  // Whether one of its rows sees the block of the positions from s on.
  bool sees(int64_t s) const { return s < end_[kColumns - 1] && s + kKeys > before_[0] + 1; }

  // Attends to that block in three steps: scores, their weights, and the sums of values.
  void score(const Operands<N>& operands, const Block<N>& block, int64_t s, int64_t width, Work<N>& work) const {
    const int64_t rows = kPlanes<N> == 1 ? keys_seen(s) : kKeys;  // planes are as far apart as there are rows
    operands.multiply(block.keys, queries_, rows, width, [&](int64_t j, int i, Exact<N> sums) {
      store(work.scores + j * kColumns + i * kLanes, to_floats(sums) * all(block.key_steps[j]));
    });
    if (s + kKeys > end_[0] || s <= before_[kColumns - 1]) mask(work.scores, s);
  }

  void weigh(const Block<N>& block, int64_t s, Work<N>& work) {
    const int64_t count = keys_seen(s);
    for (int64_t p = 0; p < kPlanes<N>; ++p) {
      std::fill_n(work.weights + (p * kKeys + count) * kColumns, (kKeys - count) * kColumns, N{});
    }
    constexpr float kOne = std::is_same_v<N, float> ? 1 : kWeight;
    static const float kLogOfOne = std::log2(kOne);
    for (int i = 0; i < kColumns; i += kLanes) {
      const Floats steps = load(query_steps_ + i), before = load(highest_ + i);
      const Floats most = fma(highest(work.scores + i, count), steps, all(*block.nothing)), now = max(before, most);
      const Floats factor = exp2(before - now), share = exp2(most - now) * all(1 / kOne);
      const Floats below = all(kLogOfOne) - most;
      Exact<N> total = exact<N>(all(0.0f));
      for (int64_t j = 0; j < count; j += kPer<N>) {
        Exact<N> together[kPer<N>];
        UNROLL for (int l = 0; l < kPer<N>; ++l) {
          const Floats weight = exp2(fma(load(work.scores + (j + l) * kColumns + i), steps, below));
          together[l] = exact<N>(min(all(kOne), weight));  // rounding of a large score may pass it
          total = add(total, together[l]);
        }
        Operands<N>::put_together(together, work.weights + j * kColumns + i * kPer<N>, kKeys * kColumns);
      }
      store(highest_ + i, now);
      store(total_ + i, fma(to_floats(total), share, load(total_ + i) * factor));
      store(work.factor + i, factor);
      store(work.share + i, share);
    }
  }

  void mix(const Operands<N>& operands, const Block<N>& block, int64_t width, const Work<N>& work) {
    operands.multiply(block.values, work.weights, width, kKeys, [&](int64_t h, int i, Exact<N> sums) {
      const Floats steps = load(work.share + i * kLanes) * all(block.value_steps[h]);
      float* to = sums_ + h * kColumns + i * kLanes;
      store(to, fma(to_floats(sums), steps, load(to) * load(work.factor + i * kLanes)));
    });
  }

  void finish(const Attention<T>& a, int64_t b, int64_t k, int64_t first) const {
    const int64_t H = a.head_dim, group = a.group(), rows = std::min<int64_t>(kColumns, a.queries * group - first);
    float inverse[kColumns];
    for (int i = 0; i < kColumns; i += kLanes) store(inverse + i, all(1.0f) / load(total_ + i));
    for (int r = 0; r < rows; ++r) {
      const int64_t t = (first + r) / group, g = (first + r) % group;
      float* out = a.out + ((b * a.queries + t) * a.heads + k * group + g) * H;
      for (int64_t h = 0; h < H; ++h) out[h] = sums_[h * kColumns + r] * inverse[r];
    }
  }

 private:
  // How many of a block's keys get scores: all that a row sees, in tiles of 16. The weights of the others are 0.
  int64_t keys_seen(int64_t s) const {
    return std::min<int64_t>(kKeys, (int64_t(end_[kColumns - 1]) - s + 15) / 16 * 16);
  }

  // Each column's highest score.
  static Floats highest(const float* scores, int64_t count) {
    constexpr int kChains = 4;
    Floats most[kChains];
    UNROLL for (int l = 0; l < kChains; ++l) most[l] = load(scores + l * kColumns);
    for (int64_t j = kChains; j < count; j += kChains) {
      UNROLL for (int l = 0; l < kChains; ++l) most[l] = max(most[l], load(scores + (j + l) * kColumns));
    }
    return max(max(most[0], most[1]), max(most[2], most[3]));
  }

  // Masks: scores of positions that a row does not see become far lower than all others.
  void mask(float* scores, int64_t s) const {
    for (int64_t j = 0; j < keys_seen(s); ++j) {
      for (int i = 0; i < kColumns; i += kLanes, scores += kLanes) {
        const Floats position = all(float(s + j)), seen = add_where(load(scores), position, load(end_ + i), all(kLowest));
        store(scores, add_where(seen, load(before_ + i), position, all(kLowest)));
      }
    }
  }

  N* queries_;   // the right operand
  float* sums_;  // [width, kColumns]
  std::vector<N> room_of_queries_, narrowed_;  // and one query
  std::vector<float> room_of_sums_, rotated_;
  float query_steps_[kColumns];
  float before_[kColumns], end_[kColumns];       // the positions between which a row sees
  float highest_[kColumns], total_[kColumns];    // score so far; sum of the weights relative to it
};

// Tiles that use a block of keys and values while it is in a core's first-level cache, and tiles that do the same
// step in a row: AMX needs about 0.4 us to start again after other work.
constexpr int64_t kTiles = 8;
template <class N>
constexpr int64_t kInStep = kPlanes<N> == 2 ? kTiles : 1;

// The queries of each sequence.
template <class T>
inline void attend_many(xla::ffi::ThreadPool& pool, const Attention<T>& a) {
  using N = Number<T>;
  const int64_t B = a.batch, K = a.kv_heads, H = a.head_dim;
  int64_t count = 0;  // of blocks in the longest sequence
  for (int64_t b = 0; b < B; ++b) count = std::max(count, (a.end(b) + kKeys - 1) / kKeys);
  static thread_local Blocks<N> scratch;
  Blocks<N>& blocks = scratch;  // the calling thread's, also inside the other threads
  blocks.resize(B * K * count, H);
  parallel_for(pool, B * K * count, 1, [&](int64_t i) {
    const int64_t b = i / (K * count), k = i / count % K, s = i % count * kKeys;
    const int64_t end = std::min(s + kKeys, a.end(b));
    for (int64_t t = std::max<int64_t>(s, a.start[b]); t < end; ++t) write(a, b, k, t - a.start[b]);
    if (s < end && s + kKeys > a.first_seen(b, 0)) pack(a, b, k, s, end - s, blocks.width, blocks[i]);
  });
  const int64_t rows = a.queries * a.group(), each = kTiles * kColumns, parts = (rows + each - 1) / each;
  parallel_for(pool, B * K * parts, 1, [&](int64_t i) {
    const int64_t head = i / parts, b = head / K, k = head % K;
    const int64_t first = (parts - 1 - i % parts) * each;  // the longest first, so that threads end together
    if (a.idle(b)) return;
    static thread_local std::vector<Tile<T, N>> tiles;
    tiles.resize((std::min(first + each, rows) - first + kColumns - 1) / kColumns);
    const auto row = [&](const auto& tile) { return first + (&tile - tiles.data()) * kColumns; };
    const Operands<N> operands;
    for (auto& tile : tiles) tile.begin(a, b, k, row(tile), blocks.width);
    for (int64_t s = a.first_seen(b, first / a.group()) / kKeys * kKeys; s < a.end(b); s += kKeys) {
      const Block<N> block = blocks[head * count + s / kKeys];
      for (auto begin = tiles.begin(); begin != tiles.end(); begin += std::min<int64_t>(kInStep<N>, tiles.end() - begin)) {
        Work<N> work[kInStep<N>];
        const auto each = [&](const auto& step) {
          for (int64_t j = 0; j < std::min<int64_t>(kInStep<N>, tiles.end() - begin); ++j) {
            if (begin[j].sees(s)) step(begin[j], work[j]);
          }
        };
        each([&](auto& tile, auto& work) { tile.score(operands, block, s, blocks.width, work); });
        each([&](auto& tile, auto& work) { tile.weigh(block, s, work); });
        each([&](auto& tile, auto& work) { tile.mix(operands, block, blocks.width, work); });
      }
    }
    for (auto& tile : tiles) tile.finish(a, b, k, row(tile));
  });
}

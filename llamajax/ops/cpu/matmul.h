// y = x W^T. W is dense or quantized in blocks; for quantized W, x is rounded to int8 in blocks of the same length.
//
// Packing: kGroup rows of W form a group, which fills the lanes of one vector. A group is stored block by block. In a
// block, the numbers of a row that one instruction multiplies are followed by those of the group's next row, so that
// one load feeds all lanes and memory is read strictly forward.
//
// A tile is some rows of x times one or two vectors of rows of W, with its sums in registers: weights are loaded once
// for all rows of the tile. With one row, memory bandwidth is the limit; with many rows, the multiply instructions are.
//
// Each row of y adds up its products in the same order, however many rows are computed with it: this makes a batch
// equal to single requests.

// Dense weights, in f32, f16 or pairs of bf16. x stays in f32; only where the processor multiplies pairs of bf16
// (InPairs) is it rounded to bf16. A row whose length is no multiple of a block is padded with zeros.
template <class T>
struct Dense {
  static constexpr bool kPairs = std::is_same_v<T, BFloat16>, kRounded = false, kSteps = false;
  using Number = std::conditional_t<kPairs, InPairs, float>;  // of x
  using Sum = Floats;  // of a row's products in a block
  using Stored = std::conditional_t<kPairs, int16_t, T>;
  using Weights = decltype(load(static_cast<const Stored*>(nullptr)));
  static constexpr int kRows = kDenseRows, kSideBySide = 1;  // of x: in a tile; that are stored side by side
  static constexpr int kWidth = kDenseWidth;  // of a group: rows in a tile of more than one row of x
  static constexpr int kBlock = 32, kAtOnce = kPairs ? 2 : 1, kLoads = kBlock / kAtOnce;
  static constexpr int64_t kWord = kAtOnce * sizeof(T);  // bytes of a row that lie side by side
  static constexpr int64_t kFirst = 0, kHead = 0, kBytes = kGroup * kBlock * sizeof(T);

  static int64_t group_bytes(int64_t num_blocks) { return num_blocks * kBytes; }
  // Where a block of a row of x is stored.
  static int64_t place(int64_t row, int64_t block, int64_t num_blocks) { return (row * num_blocks + block) * kBlock; }
  static Weights read(const uint8_t* p) { return load(reinterpret_cast<const Stored*>(p)); }
  static Floats multiply(Floats sum, Weights weights, const Number* x) { return dot(sum, weights, x); }
};

// A block of a row of x.
struct BlockOfX {
  float scale;
  int32_t sum, initial;  // of the block's quants; -zero * that
};

// Quantized weights: weight = scale * (quant - zero) + offset, with one scale, and maybe one offset, for each block of
// a row. A packed block begins with the scales of its kGroup rows (f16) and their offsets (f16), if any; quants follow.
// For 4-bit quants, the low halves of the bytes are the first half of the block.
//
// For 4-bit quants with offsets (kSteps), scale and offset are a pair of int16 in units of a step (f32), one for each
// row, stored before the row's first block. A block's dot product and the sum of its x both fit int16, so one VPDPWSSD
// replaces a multiply and an FMA: 10 instructions instead of 11 in the loop that bounds large batches.
template <int kBits_, int kBlock_, bool kOffsets_>
struct Quantized {
  static constexpr int kRows = kTileRows, kSideBySide = 1, kWidth = kLanes;
  static constexpr int kBits = kBits_, kBlock = kBlock_, kAtOnce = 4, kLoads = kBlock / kAtOnce * kBits / 8;
  static constexpr bool kRounded = true, kOffsets = kOffsets_, kSteps = kBits == 4 && kOffsets;
  using Number = int8_t;  // of x
  using Sum = Ints;
  using Weights = Bytes;
  static constexpr int64_t kWord = 4, kFirst = kSteps ? kGroup * 4 : 0;  // bytes of a row together; before the blocks
  static constexpr int64_t kHead = kGroup * (2 + 2 * kOffsets), kBytes = kHead + kGroup * kBlock * kBits / 8;

  static int64_t group_bytes(int64_t num_blocks) { return kFirst + num_blocks * kBytes; }
  static int64_t place(int64_t row, int64_t block, int64_t num_blocks) { return (row * num_blocks + block) * kBlock; }
  static Bytes read(const uint8_t* p) { return load_bytes(p); }
  static Ints multiply(Ints sum, Bytes weights, const int8_t* x) { return dot<kBits>(sum, weights, x); }
  // A block's sum, before its first product and after the last. Short ones have 16 bits, or are of weights minus 128.
  static Ints begin(const BlockOfX& x) { return all(kShortDots ? 0 : x.initial); }
  static Ints end(Ints sum, const BlockOfX& x) {
    if (!kShortDots) return sum;
    return kBits == 4 ? add(dot(sum, all(0x10001)), all(x.initial)) : add(sum, all(x.initial + 128 * x.sum));
  }
  static_assert(kBits == 8 || kBlock / 2 * 15 * 128 <= INT16_MAX);
};

template <class F>
constexpr bool kPacked = F::kLoads * F::kAtOnce < F::kBlock;  // two quants in a byte

// 4-bit quants, unpacked to a byte each: many tiles use them, and would else unpack them again and again. `begin` and
// `end` are blocks of a group.
template <class F>
struct Unpacked : F {
  static constexpr int kLoads = F::kBlock / F::kAtOnce;
  static constexpr int64_t kBytes = F::kHead + kGroup * F::kBlock;

  static void unpack(const uint8_t* group, int64_t begin, int64_t end, uint8_t* to) {
    constexpr int64_t kHalf = kGroup * F::kBlock / 2;
    to = std::copy_n(group, F::kFirst, to);
    for (int64_t b = begin; b < end; ++b, to += 2 * kHalf) {
      const uint8_t* block = group + F::kFirst + b * F::kBytes;
      to = std::copy_n(block, F::kHead, to);
      block += F::kHead;
      for (int64_t i = 0; i < kHalf; ++i) {
        to[i] = block[i] & 15;
        to[kHalf + i] = block[i] >> 4;
      }
    }
  }
};
template <class F>
constexpr bool kUnpacked = false;
template <class F>
constexpr bool kUnpacked<Unpacked<F>> = true;

// Which blocks of a row a tile takes, if not all: it goes on where the tile of the blocks before has ended.
struct Part {
  int64_t count;
  bool is_first, is_last;
};

// Rows of x, packed as the products read them.
template <class F>
struct RowsOfX {
  using Number = typename F::Number;
  struct alignas(kLine) Line {  // AMX reads tiles that cross lines at half the speed
    Number numbers[kLine / sizeof(Number)];
  };
  std::vector<Line> lines;
  std::vector<BlockOfX> blocks;  // [rows, blocks] if x is rounded

  // Each row's blocks are at F::place.
  Number* numbers() { return reinterpret_cast<Number*>(lines.data()); }
  const Number* numbers() const { return reinterpret_cast<const Number*>(lines.data()); }

  void resize(int64_t rows, int64_t num_blocks) {
    lines.resize(F::place(rows + F::kSideBySide - 1, 0, num_blocks) * sizeof(Number) / kLine + 1);
    if (F::kRounded) blocks.resize(rows * num_blocks);
  }
};

template <class F>
inline int64_t blocks_of(int64_t K) {
  return (K + F::kBlock - 1) / F::kBlock;
}

// What a block adds to y, in units of x's scale, and of the steps of its rows of weights if they have any. `head`
// points to the scales of kLanes of these rows.
template <class F>
inline Floats scaled(Ints product, const uint8_t* head, const BlockOfX& x) {
  if constexpr (F::kSteps) {
    return to_floats(dot(pairs(product, all(x.sum)), load(reinterpret_cast<const int16_t*>(head))));
  } else {
    const Half* numbers = reinterpret_cast<const Half*>(head);
    const Floats y = to_floats(product) * load(numbers);
    return F::kOffsets ? fma(load(numbers + kGroup), all(float(x.sum)), y) : y;
  }
}

// kRows rows of x times kWidth rows of weights, from `first` on, of each of kGroups groups: y [kGroups, F::kRows,
// kGroup]. With each block, it prefetches cache lines from each of the pointers `ahead`. Of unpacked weights, the
// groups have only a part of their blocks, which begins where numbers and blocks do.
template <class F, int kRows, int kGroups, int kWidth>
inline void tile(const uint8_t* const* groups, int64_t first, const typename F::Number* numbers, const BlockOfX* blocks,
                 int64_t num_blocks, const uint8_t* const* ahead, int64_t lines, float* y, Part part = {}) {
  constexpr int kAcross = kWidth / kLanes, kVectors = kGroups * kAcross;
  const int64_t K = num_blocks * F::kBlock, count = kUnpacked<F> ? part.count : num_blocks;
  const auto lane = [&](int v) { return first + v % kAcross * kLanes; };
  const auto place = [&](int r, int v) { return y + (v / kAcross * F::kRows + r) * kGroup + lane(v); };
  Floats total[kRows][kVectors];
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      total[r][v] = kUnpacked<F> && !part.is_first ? load(place(r, v)) : all(0.0f);
    }
  }
  const uint8_t *heads[kVectors], *quants[kVectors];  // of the present block
  UNROLL for (int v = 0; v < kVectors; ++v) {
    const uint8_t* block = groups[v / kAcross] + F::kFirst;
    heads[v] = block + lane(v) * (F::kSteps ? 4 : 2);
    quants[v] = block + F::kHead + F::kWord * lane(v);
  }
  for (int64_t b = 0; b < count; ++b) {
    typename F::Sum products[kRows][kVectors];
    UNROLL for (int r = 0; r < kRows; ++r) {
      UNROLL for (int v = 0; v < kVectors; ++v) {
        if constexpr (F::kRounded) {
          products[r][v] = F::begin(blocks[r * num_blocks + b]);
        } else {
          products[r][v] = all(0.0f);
        }
      }
    }
    const auto multiply = [&](const typename F::Weights (&weights)[kVectors], int step) {
      UNROLL for (int r = 0; r < kRows; ++r) {
        UNROLL for (int v = 0; v < kVectors; ++v) {
          products[r][v] = F::multiply(products[r][v], weights[v], numbers + r * K + b * F::kBlock + F::kAtOnce * step);
        }
      }
    };
    UNROLL for (int i = 0; i < F::kLoads; ++i) {
      typename F::Weights weights[kVectors], high[kVectors];
      UNROLL for (int v = 0; v < kVectors; ++v) {
        weights[v] = F::read(quants[v] + F::kWord * kGroup * i);
        if constexpr (kPacked<F>) {
          high[v] = high_nibbles(weights[v]);
          weights[v] = low_nibbles(weights[v]);
        }
      }
      multiply(weights, i);
      if constexpr (kPacked<F>) multiply(high, i + F::kLoads);
    }
    for (int64_t i = b * lines; i < (b + 1) * lines; ++i) {
      UNROLL for (int g = 0; g < kGroups; ++g) __builtin_prefetch(ahead[g] + kLine * i);
    }
    UNROLL for (int v = 0; v < kVectors; ++v) {
      UNROLL for (int r = 0; r < kRows; ++r) {
        if constexpr (F::kRounded) {
          const BlockOfX& x = blocks[r * num_blocks + b];
          const Floats part = scaled<F>(F::end(products[r][v], x), heads[v], x);
          total[r][v] = fma(part, all(x.scale), total[r][v]);
        } else {
          total[r][v] = total[r][v] + products[r][v];
        }
      }
      heads[v] += F::kBytes;
      quants[v] += F::kBytes;
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      if constexpr (F::kSteps) {
        const Floats steps = load(reinterpret_cast<const float*>(groups[v / kAcross]) + lane(v));
        if (!kUnpacked<F> || part.is_last) total[r][v] = total[r][v] * steps;
      }
      store(place(r, v), total[r][v]);
    }
  }
}

// One tile: rows of x, at most `rows`, times a pair of groups of weights. Returns how many rows it took.
template <class F, int kRows = F::kRows>
inline int64_t tile_of_pair(const uint8_t* const* pair, const typename F::Number* numbers, const BlockOfX* blocks,
                            int64_t num_blocks, int64_t rows, const uint8_t* const* ahead, int64_t lines, float* y,
                            Part part = {}) {
  if constexpr (kRows > 1) {
    constexpr int kFewer = kRows > 2 ? kRows - 2 : 1;
    // 8 rows are two tiles of 4: a tile of 2 has too few independent sums to hide the latency of an instruction.
    if (rows < kRows || (kRows == 6 && rows == 8)) {
      return tile_of_pair<F, kFewer>(pair, numbers, blocks, num_blocks, rows, ahead, lines, y, part);
    }
  }
  // Memory bandwidth is the limit of one row, and one stream of weights is read faster than two interleaved ones.
  constexpr int kWidth = kRows == 1 ? kGroup : F::kWidth, kGroups = kRows == 1 || kWidth > kLanes ? 1 : 2;
  for (int g = 0; g < 2; g += kGroups) {
    for (int64_t lane = 0; lane < kGroup; lane += kWidth) {
      tile<F, kRows, kGroups, kWidth>(pair + g, lane, numbers, blocks, num_blocks, ahead + g, lane == 0 ? lines : 0,
                                      y + g * F::kRows * kGroup, part);
    }
  }
  return kRows;
}

// Rounds a block of x to int8.
template <int kParts>
inline BlockOfX rounded(const Floats (&part)[kParts], int64_t zero, int8_t* quants) {
  Floats largest = all(0.0f), nothing = all(0.0f);
  for (const Floats x : part) {
    largest = max(largest, max(x, -x));
    nothing = fma(x, all(0.0f), nothing);  // or NaN
  }
  const float amount = maximum(largest);
  const Floats inverse = all(amount > 0 ? 127 / amount : 0);
  Ints total = all(0);
  for (int i = 0; i < kParts; ++i) {
    const Ints quant = round(part[i] * inverse);
    store_int8(quants + i * kLanes, quant);
    total = add(total, quant);
  }
  const bool finite = !has_nan(nothing);
  const int32_t quant_sum = finite ? sum(total) : 0;  // without finite x it means nothing, and may overflow
  return {finite ? amount / 127 : NAN, quant_sum, int32_t(-zero) * quant_sum};
}

// Packs row `row` of x, or of x * norm / rms(x) if there is a norm, as row `at` of `rows`. If x is rounded, a block's
// largest magnitude becomes 127. A block with NaN or an infinity gets NaN as its scale: rounding and max would lose
// it.
template <class F>
inline void take_row(const Product& p, int64_t row, int64_t at, RowsOfX<F>& rows) {
  constexpr int kParts = F::kBlock / kLanes;
  const int64_t num_blocks = blocks_of<F>(p.K);
  const float* x = p.x + row * p.K;
  float factor = 1;
  if (p.norm) {
    Floats squares = all(0.0f);
    for (int64_t k = 0; k < p.K; k += kLanes) {
      const Floats part = load_first(x + k, p.K - k);
      squares = fma(part, part, squares);
    }
    factor = 1 / std::sqrt(sum(squares) / p.K + p.eps);
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    Floats part[kParts];
    for (int i = 0; i < kParts; ++i) {
      const int64_t k = b * F::kBlock + i * kLanes;
      part[i] = load_first(x + k, p.K - k);
      if (p.norm) part[i] = part[i] * all(factor) * load_first(p.norm + k, p.K - k);
    }
    typename F::Number* numbers = rows.numbers() + F::place(at, b, num_blocks);
    if constexpr (F::kRounded) {
      rows.blocks[at * num_blocks + b] = rounded(part, p.zero, numbers);
    } else {
      for (int i = 0; i < kParts; ++i) store(numbers + i * kLanes, part[i]);
    }
  }
}

// Writes products [rows, kGroup] to y, from `row` and weight row `n` on: silu(products) * up if gated, plus the
// residual.
inline void finish(const Product& p, int64_t row, int64_t rows, int64_t n, const float* products, const float* up) {
  const int64_t width = p.gated ? p.N / 2 : p.N, count = std::min(kGroup, width - n);
  for (int64_t r = 0; r < rows; ++r) {
    float* y = p.y + (row + r) * width + n;
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats value = load(products + r * kGroup + i);
      if (p.gated) value = value / (all(1.0f) + exp2(value * all(-kLog2e))) * load(up + r * kGroup + i);
      if (p.residual) value = value + load_first(p.residual + (row + r) * width + n + i, count - i);
      store_first(y + i, value, count - i);
    }
  }
}

// A pair of groups of weights: if gated, group i of the gate and group i of up; otherwise groups 2i and 2i + 1.
template <class F>
struct Pair {
  int64_t num_blocks, first, results, step;  // results: groups of y, from `first` on; step: bytes to the next pair
  const uint8_t* weights[2];

  Pair(const Product& p, int64_t i) : num_blocks(blocks_of<F>(p.K)), first(p.gated ? i : 2 * i) {
    const int64_t groups = (p.N + kGroup - 1) / kGroup, bytes = F::group_bytes(num_blocks);
    results = std::min<int64_t>(p.gated ? 1 : 2, groups - first);
    step = (p.gated ? 1 : 2) * bytes;
    weights[0] = p.weights + first * bytes;
    weights[1] = p.weights + (p.gated ? groups / 2 + i : std::min(first + 1, groups - 1)) * bytes;
  }
  // Lines of the next pair that are prefetched with each block, if that is before `end`.
  static int64_t to_fetch(int64_t i, int64_t end) { return i + 1 < end ? (F::kBytes + kLine - 1) / kLine : 0; }
  // Prefetches the lines of y and of the residual during the products: each is in another page of memory.
  void prefetch(const Product& p, int64_t row, int64_t rows) const {
    const int64_t width = p.gated ? p.N / 2 : p.N;
    for (int64_t i = row; i < row + rows; ++i) {
      for (int64_t at = i * width + first * kGroup; at < i * width + (first + results) * kGroup; at += kGroup) {
        __builtin_prefetch(p.y + at, 1);
        if (p.residual) __builtin_prefetch(p.residual + at);
      }
    }
  }
};

// As multiply_pair, with 4-bit weights that are unpacked first, a part of the blocks after the other.
template <class F>
void multiply_unpacked(const Product& p, const RowsOfX<F>& x, int64_t row, int64_t rows, int64_t i, int64_t end) {
  using Bytes = Unpacked<F>;
  constexpr int64_t kTile = 2 * F::kRows * kGroup, kMost = kUnpackedBytes / (2 * Bytes::kBytes);
  static thread_local std::vector<uint8_t> room_of_weights;
  static thread_local std::vector<float> room_of_products;
  const Pair<F> pair(p, i);
  const int64_t num_blocks = pair.num_blocks, parts = (num_blocks + kMost - 1) / kMost;
  const int64_t most = (num_blocks + parts - 1) / parts, bytes = F::kFirst + most * Bytes::kBytes;
  const int64_t tiles = (rows + F::kRows - 1) / F::kRows, to_fetch = pair.to_fetch(i, end);
  const uint8_t* ahead[2] = {pair.weights[0] + pair.step, pair.weights[1] + pair.step};
  uint8_t* room = in_lines(room_of_weights, 2 * bytes);
  float* products = in_lines(room_of_products, (tiles + 1) * kTile);  // the last rows may be two tiles
  const uint8_t* const weights[2] = {room, room + bytes};
  for (int64_t begin = 0; begin < num_blocks; begin += most) {
    const Part part{std::min(most, num_blocks - begin), begin == 0, begin + most >= num_blocks};
    for (int g = 0; g < 2; ++g) Bytes::unpack(pair.weights[g], begin, begin + part.count, room + g * bytes);
    float* y = products;
    int64_t left = to_fetch;
    for (int64_t r = 0, count; r < rows; r += count, y += kTile) {
      if (part.is_last) pair.prefetch(p, row + r, std::min<int64_t>(rows - r, F::kRows));
      const int8_t* numbers = x.numbers() + F::place(r, begin, num_blocks);
      const BlockOfX* blocks = x.blocks.data() + r * num_blocks + begin;
      const int64_t lines = std::min((to_fetch + tiles - 1) / tiles, left);
      count = tile_of_pair<Bytes>(weights, numbers, blocks, num_blocks, rows - r, ahead, lines, y, part);
      for (const uint8_t*& next : ahead) next += kLine * lines * part.count;
      left -= lines;
      for (int64_t g = 0; part.is_last && g < pair.results; ++g) {
        finish(p, row + r, count, (pair.first + g) * kGroup, y + g * kTile / 2, y + kTile / 2);
      }
    }
  }
}

// The products of `rows` rows of x, from `row` on, with a pair. Each tile prefetches a part of the next pair, if that
// is before `end`, so that the next tiles need not wait for memory.
template <class F>
inline void multiply_pair(const Product& p, const RowsOfX<F>& x, int64_t row, int64_t rows, int64_t i, int64_t end) {
  if constexpr (kPacked<F>) {
    if (rows > (kManyTiles - 1) * F::kRows) return multiply_unpacked<F>(p, x, row, rows, i, end);
  }
  const Pair<F> pair(p, i);
  const int64_t num_blocks = pair.num_blocks, tiles = (rows + F::kRows - 1) / F::kRows;
  const uint8_t* ahead[2] = {pair.weights[0] + pair.step, pair.weights[1] + pair.step};
  int64_t to_fetch = pair.to_fetch(i, end);
  const int64_t at_once = (to_fetch + tiles - 1) / tiles;
  alignas(kLine) float products[2][F::kRows * kGroup];
  for (int64_t r = 0, count; r < rows; r += count) {
    pair.prefetch(p, row + r, std::min<int64_t>(rows - r, F::kRows));
    const typename F::Number* numbers = x.numbers() + F::place(r, 0, num_blocks);
    const BlockOfX* blocks = F::kRounded ? x.blocks.data() + r * num_blocks : nullptr;
    const int64_t lines = std::min(at_once, to_fetch);
    count = tile_of_pair<F>(pair.weights, numbers, blocks, num_blocks, rows - r, ahead, lines, products[0]);
    for (const uint8_t*& next : ahead) next += kLine * lines * num_blocks;
    to_fetch -= lines;
    for (int64_t g = 0; g < pair.results; ++g) {
      finish(p, row + r, count, (pair.first + g) * kGroup, products[g], products[1]);
    }
  }
}

template <class F>
void multiply(xla::ffi::ThreadPool& pool, const Product& p) {
  const int64_t pairs = (p.N + 2 * kGroup - 1) / (2 * kGroup), threads = pool.num_threads();
  const int64_t num_blocks = blocks_of<F>(p.K), row_bytes = num_blocks * F::kBlock * sizeof(typename F::Number);
  if (p.M >= kFewRows * threads) {
    // Many rows: each thread takes some rows, whose x and y stay in its caches until the next call. It reads all of W
    // for each panel of rows, so that few rows would be bound by memory.
    const int64_t most = std::max<int64_t>(kFewRows, kPanelBytes / row_bytes) * threads;
    const int64_t panels = (p.M + most - 1) / most * threads, unit = std::max(4, 2 * F::kSideBySide);
    const int64_t panel = ((p.M + panels - 1) / panels + unit - 1) / unit * unit;
    parallel_for(pool, (p.M + panel - 1) / panel, 1, [&](int64_t i) {
      static thread_local RowsOfX<F> x;
      const int64_t begin = i * panel, rows = std::min(p.M - begin, panel);
      x.resize(rows, num_blocks);
      for (int64_t row = 0; row < rows; ++row) take_row<F>(p, begin + row, row, x);
      for (int64_t pair = 0; pair < pairs; ++pair) multiply_pair<F>(p, x, begin, rows, pair, pairs);
    });
    return;
  }
  static thread_local RowsOfX<F> scratch;
  RowsOfX<F>& x = scratch;  // the calling thread's, also inside the other threads
  x.resize(p.M, num_blocks);
  parallel_for(pool, p.M, std::max<int64_t>(1, 8192 / p.K), [&](int64_t row) { take_row<F>(p, row, row, x); });
  parallel_for(pool, pairs, std::max<int64_t>(1, pairs / (16 * threads)), [&](int64_t pair, int64_t end) {
    multiply_pair<F>(p, x, 0, p.M, pair, end);
  });
}

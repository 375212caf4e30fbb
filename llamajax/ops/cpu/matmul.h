// y = x W^T for W in blocks of few bits, x rounded to int8 in blocks of as many.
//
// A weight is scale * (quant - zero) + offset, with a scale, and perhaps an offset, for each block of a row. W is
// stored for groups of kGroup rows; of each group, block after block: the scales of its rows (f16), their offsets
// (f16) if there are any, and the quants, 4 of a row beside 4 of the next. Of 4-bit quants, the bytes' low halves are
// the first half of the block. A row of y is computed in the same order whatever rows stand beside it.
//
// Of 4-bit quants with offsets, scale and offset stand side by side as int16, in units of a step (f32) that each row
// has before its first block. A block's dot product fits 16 bits, as the sum of its x does: one product of pairs takes
// scale and offset, where f32 takes two instructions that multiply. One less of eleven, which many rows wait for.

// x as the products take it.
struct BlockOfX {
  float scale;
  int32_t sum, initial;  // of the block's quants; -zero * that
};
struct RoundedX {
  std::vector<int8_t> quants;    // [rows, K]
  std::vector<BlockOfX> blocks;  // [rows, K / block]

  void resize(int64_t rows, int64_t K, int64_t block) {
    quants.resize(rows * K);
    blocks.resize(rows * (K / block));
  }
};

template <int kBits_, int kBlock_, bool kOffsets_>
struct Format {
  static constexpr int kBits = kBits_, kBlock = kBlock_;
  static constexpr bool kOffsets = kOffsets_, kSteps = kBits == 4 && kOffsets;
  static constexpr int64_t kFirst = kSteps ? kGroup * 4 : 0;  // where the first block is
  static constexpr int64_t kHead = kGroup * (2 + 2 * kOffsets), kBytes = kHead + kGroup * kBlock * kBits / 8;

  static int64_t group_bytes(int64_t num_blocks) { return kFirst + num_blocks * kBytes; }
};

// A block's part of y, in units of x's scale and of the steps of its rows of weights, if they have any. `head`: of
// kLanes of these.
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

// kRows rows of x times kLanes rows of weights of each of kGroups groups: y [kGroups, kTileRows, kGroup]. Meanwhile,
// with each block, as many lines are fetched from where each of `ahead` points to.
template <class F, int kRows, int kGroups>
inline void tile(const uint8_t* const* groups, int64_t lane, const int8_t* quants, const BlockOfX* blocks,
                 int64_t num_blocks, const uint8_t* const* ahead, int64_t lines, float* y) {
  constexpr int kSteps = F::kBlock / 4, kLoads = kSteps * F::kBits / 8;
  const int64_t K = num_blocks * F::kBlock;
  Floats total[kRows][kGroups];
  UNROLL for (int i = 0; i < kRows * kGroups; ++i) total[i / kGroups][i % kGroups] = all(0.0f);
  for (int64_t b = 0; b < num_blocks; ++b) {
    Ints products[kRows][kGroups];
    UNROLL for (int r = 0; r < kRows; ++r) {
      UNROLL for (int g = 0; g < kGroups; ++g) {
        products[r][g] = all(blocks[r * num_blocks + b].initial);
      }
    }
    const auto multiply = [&](const Bytes (&weights)[kGroups], int step) {
      UNROLL for (int r = 0; r < kRows; ++r) {
        UNROLL for (int g = 0; g < kGroups; ++g) {
          products[r][g] = dot<F::kBits>(products[r][g], weights[g], quants + r * K + b * F::kBlock + 4 * step);
        }
      }
    };
    UNROLL for (int i = 0; i < kLoads; ++i) {
      Bytes weights[kGroups], high[kGroups];
      UNROLL for (int g = 0; g < kGroups; ++g) {
        weights[g] = load_bytes(groups[g] + F::kFirst + b * F::kBytes + F::kHead + 4 * (lane + kGroup * i));
        if constexpr (F::kBits == 4) {
          high[g] = high_nibbles(weights[g]);
          weights[g] = low_nibbles(weights[g]);
        }
      }
      multiply(weights, i);
      if constexpr (F::kBits == 4) multiply(high, i + kLoads);
    }
    for (int64_t i = b * lines; i < (b + 1) * lines; ++i) {
      UNROLL for (int g = 0; g < kGroups; ++g) __builtin_prefetch(ahead[g] + kLine * i);
    }
    UNROLL for (int g = 0; g < kGroups; ++g) {
      const uint8_t* head = groups[g] + F::kFirst + b * F::kBytes + lane * (F::kSteps ? 4 : 2);
      UNROLL for (int r = 0; r < kRows; ++r) {
        const BlockOfX& x = blocks[r * num_blocks + b];
        total[r][g] = fma(scaled<F>(products[r][g], head, x), all(x.scale), total[r][g]);
      }
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r) {
    UNROLL for (int g = 0; g < kGroups; ++g) {
      if constexpr (F::kSteps) total[r][g] = total[r][g] * load(reinterpret_cast<const float*>(groups[g]) + lane);
      store(y + (g * kTileRows + r) * kGroup + lane, total[r][g]);
    }
  }
}

// As many rows of x as a tile has, at most `rows`, times a pair of groups of weights. Returns how many.
template <class F, int kRows = kTileRows>
inline int64_t tile_of_pair(const uint8_t* const* pair, const int8_t* quants, const BlockOfX* blocks,
                            int64_t num_blocks, int64_t rows, const uint8_t* const* ahead, int64_t lines, float* y) {
  if constexpr (kRows > 1) {
    constexpr int kFewer = kRows > 2 ? kRows - 2 : 1;
    // 8 rows are taken as 4 and 4: in a tile of 2 there is too little to do meanwhile.
    if (rows < kRows || (kRows == 6 && rows == 8)) {
      return tile_of_pair<F, kFewer>(pair, quants, blocks, num_blocks, rows, ahead, lines, y);
    }
  }
  constexpr int kTogether = kRows > 1 ? 2 : 1;  // one row waits for memory, which comes faster in a row
  for (int g = 0; g < 2; g += kTogether) {
    for (int64_t lane = 0; lane < kGroup; lane += kLanes) {
      tile<F, kRows, kTogether>(pair + g, lane, quants, blocks, num_blocks, ahead + g, lane == 0 ? lines : 0,
                                y + g * kTileRows * kGroup);
    }
  }
  return kRows;
}

// Row `row` of x to int8, as row `at` of `rounded`: each block with its largest magnitude at 127; of x * norm / rms(x)
// if there is a norm. A block with NaN or an infinity has NaN for its scale, since rounding and max lose them.
template <class F>
inline void round_row(const Product& p, int64_t row, int64_t at, RoundedX& rounded) {
  constexpr int kParts = F::kBlock / kLanes;
  const float* x = p.x + row * p.K;
  int8_t* quants = rounded.quants.data() + at * p.K;
  BlockOfX* blocks = rounded.blocks.data() + at * (p.K / F::kBlock);
  float factor = 1;
  if (p.norm) {
    Floats squares = all(0.0f);
    for (int64_t k = 0; k < p.K; k += kLanes) squares = fma(load(x + k), load(x + k), squares);
    factor = 1 / std::sqrt(sum(squares) / p.K + p.eps);
  }
  for (int64_t b = 0; b < p.K / F::kBlock; ++b) {
    Floats part[kParts], largest = all(0.0f), nothing = all(0.0f);
    for (int i = 0; i < kParts; ++i) {
      const int64_t k = b * F::kBlock + i * kLanes;
      part[i] = load(x + k);
      if (p.norm) part[i] = part[i] * all(factor) * load(p.norm + k);
      largest = max(largest, max(part[i], -part[i]));
      nothing = fma(part[i], all(0.0f), nothing);  // or NaN
    }
    const float amount = maximum(largest);
    const Floats inverse = all(amount > 0 ? 127 / amount : 0);
    Ints total = all(0);
    for (int i = 0; i < kParts; ++i) {
      const Ints rounded = round(part[i] * inverse);
      store_int8(quants + b * F::kBlock + i * kLanes, rounded);
      total = add(total, rounded);
    }
    const int32_t quant_sum = sum(total);
    blocks[b] = {has_nan(nothing) ? NAN : amount / 127, quant_sum, int32_t(-p.zero) * quant_sum};
  }
}

// What is made of products [rows, kGroup] that begin at `row` and at weight row `n`.
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

// The products of `rows` rows of x, which begin at `row`, with a pair of groups of weights: of a gate and of what it
// is for, or two that follow each other. The pair after it comes meanwhile, a part with each tile, if it is before
// `end`: it would be waited for otherwise.
template <class F>
inline void multiply_pair(const Product& p, const RoundedX& x, int64_t row, int64_t rows, int64_t pair, int64_t end) {
  const int64_t num_blocks = p.K / F::kBlock, groups = (p.N + kGroup - 1) / kGroup;
  const int64_t first = p.gated ? pair : 2 * pair;
  const int64_t second = p.gated ? groups / 2 + pair : std::min(first + 1, groups - 1);
  const int64_t results = std::min<int64_t>(p.gated ? 1 : 2, groups - first), width = p.gated ? p.N / 2 : p.N;
  const uint8_t* const weights[2] = {p.weights + first * F::group_bytes(num_blocks),
                                     p.weights + second * F::group_bytes(num_blocks)};
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, step = (p.gated ? 1 : 2) * F::group_bytes(num_blocks);
  const uint8_t* ahead[2] = {weights[0] + step, weights[1] + step};
  int64_t to_fetch = pair + 1 < end ? (F::kBytes + kLine - 1) / kLine : 0;  // lines, with each block
  const int64_t at_once = (to_fetch + tiles - 1) / tiles;
  float products[2][kTileRows * kGroup];
  for (int64_t r = 0, count; r < rows; r += count) {
    // y's lines, and the residual's, come while the products are computed: each is in another page.
    for (int64_t i = row + r; i < row + std::min(rows, r + kTileRows); ++i) {
      for (int64_t at = i * width + first * kGroup; at < i * width + (first + results) * kGroup; at += kGroup) {
        __builtin_prefetch(p.y + at, 1);
        if (p.residual) __builtin_prefetch(p.residual + at);
      }
    }
    const int8_t* quants = x.quants.data() + r * p.K;
    const BlockOfX* blocks = x.blocks.data() + r * num_blocks;
    const int64_t lines = std::min(at_once, to_fetch);
    count = tile_of_pair<F>(weights, quants, blocks, num_blocks, rows - r, ahead, lines, products[0]);
    for (const uint8_t*& next : ahead) next += kLine * lines * num_blocks;
    to_fetch -= lines;
    for (int64_t i = 0; i < results; ++i) finish(p, row + r, count, (first + i) * kGroup, products[i], products[1]);
  }
}

template <class F>
void multiply(xla::ffi::ThreadPool& pool, const Product& p) {
  const int64_t pairs = (p.N + 2 * kGroup - 1) / (2 * kGroup), threads = pool.num_threads();
  if (p.M >= kFewRows * threads) {
    // The threads share the rows out: what one makes of its rows here, and in the next call, stays in its caches.
    const int64_t most = std::max<int64_t>(kTileRows, kPanelBytes / p.K) * threads;
    const int64_t panels = (p.M + most - 1) / most * threads, panel = ((p.M + panels - 1) / panels + 3) / 4 * 4;
    parallel_for(pool, (p.M + panel - 1) / panel, 1, [&](int64_t i) {
      static thread_local RoundedX x;
      const int64_t begin = i * panel, rows = std::min(p.M - begin, panel);
      x.resize(rows, p.K, F::kBlock);
      for (int64_t row = 0; row < rows; ++row) round_row<F>(p, begin + row, row, x);
      for (int64_t pair = 0; pair < pairs; ++pair) multiply_pair<F>(p, x, begin, rows, pair, pairs);
    });
    return;
  }
  static thread_local RoundedX scratch;
  RoundedX& x = scratch;  // this thread's, in the others too
  x.resize(p.M, p.K, F::kBlock);
  parallel_for(pool, p.M, std::max<int64_t>(1, 8192 / p.K), [&](int64_t row) { round_row<F>(p, row, row, x); });
  parallel_for(pool, pairs, std::max<int64_t>(1, pairs / (16 * threads)), [&](int64_t pair, int64_t end) {
    multiply_pair<F>(p, x, 0, p.M, pair, end);
  });
}

inline void linear(xla::ffi::ThreadPool& pool, const Product& p) {
  const int bits = int(p.bits), block = int(p.block);
  if (bits == 4 && block == 32 && !p.offsets) return multiply<Format<4, 32, false>>(pool, p);
  if (bits == 4 && block == 32 && p.offsets) return multiply<Format<4, 32, true>>(pool, p);
  if (bits == 8 && block == 32 && !p.offsets) return multiply<Format<8, 32, false>>(pool, p);
  if (bits == 8 && block == 32 && p.offsets) return multiply<Format<8, 32, true>>(pool, p);
  if (bits == 4 && block == 16 && !p.offsets) return multiply<Format<4, 16, false>>(pool, p);
  if (bits == 4 && block == 16 && p.offsets) return multiply<Format<4, 16, true>>(pool, p);
  return multiply<Format<8, 16, false>>(pool, p);
}

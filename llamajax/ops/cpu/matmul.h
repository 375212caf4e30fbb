// y = x W^T for W in blocks of few bits, x rounded to int8 in blocks of as many.
//
// A weight is scale * (quant - zero) + offset, with a scale, and perhaps an offset, for each block of a row. W is
// stored for groups of kGroup rows; of each group, block after block: the scales of its rows (f16), their offsets
// (f16) if there are any, and the quants, 4 of a row beside 4 of the next. Of 4-bit quants, the bytes' low halves are
// the first half of the block. A row of y is computed in the same order whatever rows stand beside it.

// x as the products take it.
struct BlockOfX {
  float scale, sum;  // sum: of the block's numbers
  int32_t initial;   // -zero * the sum of the block's quants
};
struct RoundedX {
  std::vector<int8_t> quants;    // [M, K]
  std::vector<BlockOfX> blocks;  // [M, K / block]
};

template <int kBits_, int kBlock_, bool kOffsets_>
struct Format {
  static constexpr int kBits = kBits_, kBlock = kBlock_;
  static constexpr bool kOffsets = kOffsets_;
  static constexpr int64_t kHead = kGroup * (2 + 2 * kOffsets), kBytes = kHead + kGroup * kBlock * kBits / 8;
};

// kRows rows of x times kLanes rows of weights: y [kRows, kGroup].
template <class F, int kRows>
inline void tile(const uint8_t* weights, int64_t lane, const int8_t* quants, const BlockOfX* blocks, int64_t num_blocks,
                 float* y) {
  constexpr int kSteps = F::kBlock / 4;
  const int64_t K = num_blocks * F::kBlock;
  Floats total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = all(0.0f);
  for (int64_t b = 0; b < num_blocks; ++b, weights += F::kBytes) {
    const uint16_t* head = reinterpret_cast<const uint16_t*>(weights) + lane;
    const uint8_t* packed = weights + F::kHead + 4 * lane;
    const Floats scale = load_half(head);
    Bytes step[kSteps];
    if constexpr (F::kBits == 4) {
      for (int s = 0; s < kSteps / 2; ++s) {
        const Bytes both = load_bytes(packed + 4 * kGroup * s);
        step[s] = low_nibbles(both);
        step[s + kSteps / 2] = high_nibbles(both);
      }
    } else {
      for (int s = 0; s < kSteps; ++s) step[s] = load_bytes(packed + 4 * kGroup * s);
    }
    // Four rows at once: a row's sums wait for each other.
    constexpr int kTogether = kRows % 4 == 0 ? 4 : kRows;
    UNROLL for (int first = 0; first < kRows; first += kTogether) {
      Ints products[kTogether];
      UNROLL for (int r = 0; r < kTogether; ++r) products[r] = all(blocks[(first + r) * num_blocks + b].initial);
      UNROLL for (int s = 0; s < kSteps; ++s) {
        UNROLL for (int r = 0; r < kTogether; ++r) {
          products[r] = dot<F::kBits>(products[r], step[s], quants + (first + r) * K + b * F::kBlock + 4 * s);
        }
      }
      UNROLL for (int r = 0; r < kTogether; ++r) {
        const BlockOfX& x = blocks[(first + r) * num_blocks + b];
        Floats& sum = total[first + r];
        sum = fma(to_floats(products[r]), scale * all(x.scale), sum);
        if constexpr (F::kOffsets) sum = fma(load_half(head + kGroup), all(x.sum), sum);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) store(y + r * kGroup + lane, total[r]);
}

// As many rows of x as a tile has, at most `rows`, times a group of weights. Returns how many.
template <class F, int kRows = kTileRows>
inline int64_t tile_of_group(const uint8_t* weights, const int8_t* quants, const BlockOfX* blocks, int64_t num_blocks,
                             int64_t rows, float* y) {
  if constexpr (kRows > 1) {
    constexpr int kFewer = kRows > 4 ? kRows - 4 : kRows / 2;
    if (rows < kRows) return tile_of_group<F, kFewer>(weights, quants, blocks, num_blocks, rows, y);
  }
  for (int64_t lane = 0; lane < kGroup; lane += kLanes) tile<F, kRows>(weights, lane, quants, blocks, num_blocks, y);
  return kRows;
}

// One row of x to int8, each block with its largest magnitude at 127; of x * norm / rms(x) if there is a norm.
template <class F>
inline void round_row(const Product& p, const float* x, int8_t* quants, BlockOfX* blocks) {
  constexpr int kParts = F::kBlock / kLanes;
  float factor = 1;
  if (p.norm) {
    Floats squares = all(0.0f);
    for (int64_t k = 0; k < p.K; k += kLanes) squares = fma(load(x + k), load(x + k), squares);
    factor = 1 / std::sqrt(sum(squares) / p.K + p.eps);
  }
  for (int64_t b = 0; b < p.K / F::kBlock; ++b) {
    Floats part[kParts], largest = all(0.0f);
    for (int i = 0; i < kParts; ++i) {
      const int64_t k = b * F::kBlock + i * kLanes;
      part[i] = load(x + k);
      if (p.norm) part[i] = part[i] * all(factor) * load(p.norm + k);
      largest = max(largest, max(part[i], -part[i]));
    }
    const float amount = maximum(largest);
    const Floats inverse = all(amount > 0 ? 127 / amount : 0);
    Ints total = all(0);
    for (int i = 0; i < kParts; ++i) {
      const Ints rounded = round(part[i] * inverse);
      store_int8(quants + b * F::kBlock + i * kLanes, rounded);
      total = add(total, rounded);
    }
    const int32_t quant_sum = int32_t(sum(to_floats(total)));
    blocks[b] = {amount / 127, amount / 127 * quant_sum, int32_t(-p.zero) * quant_sum};
  }
}

// What is made of products [rows, kGroup] that begin at `row` and at weight row `n`.
inline void finish(const Product& p, int64_t row, int64_t rows, int64_t n, const float* products, const float* up) {
  const int64_t width = p.gated ? p.N / 2 : p.N, count = std::min(kGroup, width - n);
  for (int64_t r = 0; r < rows; ++r) {
    float* y = p.y + (row + r) * width + n;
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats value = load(products + r * kGroup + i);
      if (p.gated) value = value / (all(1.0f) + exp(-value)) * load(up + r * kGroup + i);
      if (p.residual) value = value + load_first(p.residual + (row + r) * width + n + i, count - i);
      store_first(y + i, value, count - i);
    }
  }
}

template <class F>
void multiply(xla::ffi::ThreadPool& pool, const Product& p) {
  const int64_t num_blocks = p.K / F::kBlock, group_bytes = num_blocks * F::kBytes;
  static thread_local RoundedX rounded;
  rounded.quants.resize(p.M * p.K);
  rounded.blocks.resize(p.M * num_blocks);
  int8_t* quants = rounded.quants.data();
  BlockOfX* blocks = rounded.blocks.data();
  parallel_for(pool, p.M, std::max<int64_t>(1, 8192 / p.K), [&](int64_t row) {
    round_row<F>(p, p.x + row * p.K, quants + row * p.K, blocks + row * num_blocks);
  });

  // Rows of x that stay in a core's second-level cache while all weights pass.
  const int64_t panel = std::max<int64_t>(kTileRows, kPanelBytes / p.K / kTileRows * kTileRows);
  const int64_t width = p.gated ? p.N / 2 : p.N, groups = (width + kGroup - 1) / kGroup;
  const int64_t panels = (p.M + panel - 1) / panel;
  // Few rows wait for memory, which comes faster in a row; many should end at the same time.
  const int64_t shares = pool.num_threads() * (p.M > kTileRows ? 16 : 4);
  parallel_for(pool, panels * groups, std::max<int64_t>(1, groups / std::max<int64_t>(1, shares)), [&](int64_t task) {
    const int64_t begin = task / groups * panel, end = std::min(p.M, begin + panel), group = task % groups;
    const uint8_t* weights = p.weights + group * group_bytes;
    float products[kTileRows * kGroup], up[kTileRows * kGroup];
    for (int64_t row = begin, rows; row < end; row += rows) {
      const int8_t* q = quants + row * p.K;
      const BlockOfX* b = blocks + row * num_blocks;
      // y's lines, and the residual's, come while the products are computed: each is in another page.
      for (int64_t r = row; r < std::min(end, row + kTileRows); ++r) {
        __builtin_prefetch(p.y + r * width + group * kGroup, 1);
        if (p.residual) __builtin_prefetch(p.residual + r * width + group * kGroup);
      }
      rows = tile_of_group<F>(weights, q, b, num_blocks, end - row, products);
      if (p.gated) tile_of_group<F>(weights + groups * group_bytes, q, b, num_blocks, end - row, up);
      finish(p, row, rows, group * kGroup, products, up);
    }
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

// AMX: products of bf16 with dense weights, and of bytes in attention.
//
// For dense weights: 16 rows of x times a block of 16 rows of weights in one instruction, which reads
// packed weights as they are. A tile with fewer rows of x takes the same time.

struct DenseTiles : Dense<BFloat16> {
  static constexpr int kRows = 32, kSideBySide = 16;

  static int64_t place(int64_t row, int64_t block, int64_t num_blocks) {
    return ((row / 16 * num_blocks + block) * 16 + row % 16) * kBlock;
  }
};

// The shape of each of the 8 tiles: its rows, and the bytes of a row.
struct alignas(kLine) TileShapes {
  uint8_t palette = 1, zeros[15] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Two tiles of x times two of weights: each tile that is loaded is multiplied twice.
template <>
inline int64_t tile_of_pair<DenseTiles, DenseTiles::kRows>(const uint8_t* const* pair, const BFloat16* numbers,
                                                           const BlockOfX*, int64_t num_blocks, int64_t rows,
                                                           const uint8_t* const* ahead, int64_t lines, float* y, Part) {
  using F = DenseTiles;
  static constexpr TileShapes shapes;
  _tile_loadconfig(&shapes);
  const BFloat16* second = numbers + F::place(16, 0, num_blocks);
  const auto fetch = [&](int g, int64_t b) {
    for (int64_t i = b * lines; i < (b + 1) * lines; ++i) __builtin_prefetch(ahead[g] + kLine * i);
  };
  if (rows <= 16) {
    for (int g = 0; g < 2; ++g) {
      _tile_zero(0);
      for (int64_t b = 0; b < num_blocks; ++b) {
        _tile_loadd(4, numbers + F::place(0, b, num_blocks), kLine);
        _tile_loadd(6, pair[g] + b * F::kBytes, kLine);
        _tile_dpbf16ps(0, 4, 6);
        fetch(g, b);
      }
      _tile_stored(0, y + g * F::kRows * kGroup, kLine);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = 0; b < num_blocks; ++b) {
      _tile_loadd(4, numbers + F::place(0, b, num_blocks), kLine);
      _tile_loadd(6, pair[0] + b * F::kBytes, kLine);
      _tile_loadd(7, pair[1] + b * F::kBytes, kLine);
      _tile_loadd(5, second + F::place(0, b, num_blocks), kLine);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      fetch(0, b);
      fetch(1, b);
    }
    _tile_stored(0, y, kLine);
    _tile_stored(1, y + F::kRows * kGroup, kLine);
    _tile_stored(2, y + 16 * kGroup, kLine);
    _tile_stored(3, y + (F::kRows + 16) * kGroup, kLine);
  }
  _tile_release();
  return std::min<int64_t>(rows, F::kRows);
}

// Attention's operands have 12 bits, split into bytes as 64 * high + low. The products of the bytes sum up to the
// same integer as the products of int16 numbers do.
template <>
struct Operands<int8_t> {
  Operands() {
    static constexpr TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Operands() { _tile_release(); }

  static void put(Ints x, int8_t* p, int64_t plane) {
    store_int8(p, x >> 6);
    store_int8(p + plane, x & 63);
  }
  static void put_together(const Ints* x, int8_t* p, int64_t plane) {
    const Ints even = pairs(x[0], x[2]), odd = pairs(x[1], x[3]);
    const auto shift = [](Ints x) { return (Ints)_mm512_srli_epi16((__m512i)x, 6); };
    const Ints high = (shift(even) & 0x00ff00ff) | (shift(odd) << 8 & int32_t(0xff00ff00));
    const Ints low = (even & 0x003f003f) | (odd & 0x003f003f) << 8;
    store(reinterpret_cast<int16_t*>(p), high);
    store(reinterpret_cast<int16_t*>(p + plane), low);
  }

  // The last tile's sums are used while the next one's are multiplied, and are read before these are stored.
  template <class At>
  void multiply(const int8_t* left, const int8_t* right, int64_t rows, int64_t depth, const At& at) const {
    alignas(kLine) int32_t sums[2][3][kTile * kLanes];
    for (int64_t row = 0; row <= rows; row += kTile) {
      UNROLL for (int i = 0; i < 2; ++i) {
        if (row < rows) multiply_tile(left + row * depth, rows * depth, right + i * kLine, kColumns * depth, depth);
        for (int64_t r = 0; row > 0 && r < kTile; ++r) {
          const auto part = [&](int j) { return (Ints)_mm512_load_si512(sums[i][j] + r * kLanes); };
          at(row - kTile + r, i, (part(0) << 12) + (part(1) << 6) + part(2));
        }
        if (row < rows) {
          _tile_stored(0, sums[i][0], kLine);
          _tile_stored(2, sums[i][2], kLine);
          _tile_stored(1, sums[i][1], kLine);
        }
      }
    }
  }

 private:
  static constexpr int64_t kTile = 16;

  // kTile rows and kLanes columns. Tile 0 sums products of high bytes, tile 1 of high and low ones, tile 2 of low
  // ones.
  static void multiply_tile(const int8_t* left, int64_t left_plane, const int8_t* right, int64_t right_plane,
                            int64_t depth) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int64_t d = 0; d < depth; d += kLine, left += kLine, right += kLine * kColumns) {
      _tile_loadd(4, left, depth);
      _tile_loadd(7, right + right_plane, 4 * kColumns);
      _tile_loadd(5, left + left_plane, depth);
      _tile_loadd(6, right, 4 * kColumns);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 7);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 5, 6);
    }
  }
};

// Products of bf16 in AMX's tiles: 16 rows of x times a block of 16 rows of weights in one instruction, which reads
// packed weights as they are. A tile of fewer rows of x takes no less time, and one row waits for memory anyway.

struct DenseTiles : Dense<BFloat16> {
  static constexpr int kRows = 32, kSideBySide = 16;

  static int64_t place(int64_t row, int64_t block, int64_t num_blocks) {
    return ((row / 16 * num_blocks + block) * 16 + row % 16) * kBlock;
  }
};

// Rows and bytes of a row, of each of the 8 tiles.
struct alignas(kLine) TileShapes {
  uint8_t palette = 1, zeros[15] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A tile of x and one of weights stay while they are multiplied with two others each.
template <>
inline int64_t tile_of_pair<DenseTiles, DenseTiles::kRows>(const uint8_t* const* pair, const BFloat16* numbers,
                                                           const BlockOfX*, int64_t num_blocks, int64_t rows,
                                                           const uint8_t* const* ahead, int64_t lines, float* y) {
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

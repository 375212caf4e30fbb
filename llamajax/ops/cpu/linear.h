// Chooses the product for a weight's format.

inline void linear(xla::ffi::ThreadPool& pool, const Product& p) {
  const bool wide = p.block == 32;
  switch (p.numbers) {
    case Numbers::f32: return multiply<Dense<float>>(pool, p);
    case Numbers::f16: return multiply<Dense<Half>>(pool, p);
    case Numbers::bf16: return multiply<Dense<BFloat16>>(pool, p);
    case Numbers::u4:
      if (p.offsets) return wide ? multiply<Quantized<4, 32, true>>(pool, p) : multiply<Quantized<4, 16, true>>(pool, p);
      return wide ? multiply<Quantized<4, 32, false>>(pool, p) : multiply<Quantized<4, 16, false>>(pool, p);
    case Numbers::u8:
      if (p.offsets) return multiply<Quantized<8, 32, true>>(pool, p);
      return wide ? multiply<Quantized<8, 32, false>>(pool, p) : multiply<Quantized<8, 16, false>>(pool, p);
  }
}

// What all instruction sets share, in terms of their vectors.

inline void store(int8_t* p, Floats x) { store_int8(p, round(x)); }

// The first `count` numbers, and zeros.
template <class T>
inline Floats load_first(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T padded[kLanes] = {};
  if (count > 0) std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_first(T* p, Floats x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, count * sizeof(T));
}

constexpr float kLog2e = 1.44269504f;

// 2^x to about 2e-7, relatively; exact for a whole x; 0 and infinity beyond what f32 holds. 2^n * 2^r with |r| <= 1/2,
// 2^r by the polynomial of the fifth degree with the least relative error of those that are 1 at 0.
inline Floats exp2(Floats x) {
  const Floats n = whole(x), r = x - n;
  Floats y = all(0.00132647273f);
  constexpr float kRest[] = {0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.0f};
  UNROLL for (const float c : kRest) y = fma(y, r, all(c));
  return times_power_of_two(y, n);
}

// Compacts: stores the numbers x with low <= x < high, and the values beside them. May write up to kLanes numbers
// more behind them. Returns how many there are.
template <class F>
inline int64_t keep_between(float* to, float* to_beside, F x, F beside, float low, float high) {
  float numbers[kLanes], others[kLanes];
  store(numbers, x);
  store(others, beside);
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) {  // without branches: neither comparison can be predicted
    to[count] = numbers[i];
    to_beside[count] = others[i];
    count += !(numbers[i] < low) & !(numbers[i] >= high);
  }
  return count;
}

// In place of the products of pairs, where numbers are not rounded to bf16.
inline Floats dot(Floats sum, Floats numbers, const float* x) { return fma(numbers, all(*x), sum); }
inline Floats to_floats(Floats x) { return x; }
inline Floats add(Floats x, Floats y) { return x + y; }
// sum + the dot product of the two bf16 in each lane with the same two numbers.
inline Floats dot(Floats sum, Ints pairs, const float* x) {
  return fma(second_bf16(pairs), all(x[1]), fma(first_bf16(pairs), all(x[0]), sum));
}

// Memory for `count` numbers, aligned to a cache line: a vector that crosses lines loads at half the speed, and an
// AMX tile at a fourth.
template <class N>
inline N* in_lines(std::vector<N>& room, int64_t count) {
  room.resize(count + kLine / sizeof(N));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(room.data());
  return reinterpret_cast<N*>((begin + kLine - 1) / kLine * kLine);
}

// Draws a row's token: adds bias and penalties to its scores, makes weights of them by temperature, min-p, top-k and
// top-p, and takes the token at which the running sum of weights passes a uniform number. A row fits a core's
// second-level cache.

constexpr int64_t kPart = 64;  // scores that are skipped together if none of them is large enough

struct Row {
  const float* scores;         // whole parts
  std::vector<float> weights;  // of scores; undefined in a part of which nothing is left
  std::vector<float> highest;  // of each part: its largest score; -infinity if nothing is left of it
  std::vector<float> mass;     // of each part: the sum of its weights

  int64_t parts() const { return int64_t(highest.size()); }
  void add_up(int64_t part) {
    Floats total = all(0.0f);
    for (int64_t j = part * kPart; j < (part + 1) * kPart; j += kLanes) total = total + load(&weights[j]);
    mass[part] = sum(total);
  }
  double total() const {
    double sum = 0;
    for (const float part : mass) sum += part;
    return sum;
  }
};

// Maps f32 to integers of the same order, and back; NaN comes before and after the infinities.
inline uint32_t place_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float in_order(uint32_t place) {
  const uint32_t bits = place & 0x80000000u ? place ^ 0x80000000u : ~place;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Threshold {
  float score;
  bool unique;  // whether one token only has this score
};

// The largest score t for which the weights of scores >= t, or their number, reach `need`; `bound` if none does, which
// t is known not to be below. By bisection on bits, two at a time, among fewer and fewer scores.
template <bool kCounts>
inline Threshold threshold(const Row& row, float need, float bound) {
  static thread_local std::vector<float> scratch;
  scratch.resize(2 * (row.parts() * kPart + kLanes));
  float* const scores = scratch.data();  // those that may be t
  float* const weights = scores + row.parts() * kPart + kLanes;
  int64_t count = 0;
  const auto keep = [&](const float* x, const float* weight, int64_t number, float low, float high) {
    int64_t kept = count;
    for (int64_t j = 0; j < number; j += kLanes) {
      kept += keep_between(scores + kept, weights + kept, load(x + j), kCounts ? all(1.0f) : load(weight + j), low, high);
    }
    count = kept;
  };
  float most = -INFINITY;
  for (int64_t part = 0; part < row.parts(); ++part) {
    most = std::max(most, row.highest[part]);
    if (row.highest[part] < bound) continue;
    keep(row.scores + part * kPart, &row.weights[part * kPart], kPart, bound, NAN);
  }
  most += 0.0f;  // makes 0 of -0, which equals it but has another place
  constexpr int kTries = 3;
  int shift = 30;
  while (shift > 0 && (place_of(bound) ^ place_of(most)) >> shift == 0) shift -= 2;
  uint32_t place = place_of(most) & ~((4u << shift) - 1);
  float above = 0;  // what larger scores reach
  for (; shift >= 0 && count > 1; shift -= 2) {
    std::fill_n(scores + count, kLanes, -INFINITY);
    std::fill_n(weights + count, kLanes, 0.0f);
    Floats total[kTries], least[kTries];
    for (int i = 0; i < kTries; ++i) {
      total[i] = all(0.0f);
      least[i] = all(in_order(place + (uint32_t(i + 1) << shift)));
    }
    for (int64_t j = 0; j < count; j += kLanes) {
      UNROLL for (int i = 0; i < kTries; ++i) {
        total[i] = add_where(total[i], load(scores + j), least[i], load(weights + j));
      }
    }
    uint32_t reached = 0;
    while (reached < kTries && above + sum(total[reached]) >= need) ++reached;
    if (reached < kTries) above += sum(total[reached]);
    place += reached << shift;
    const float low = in_order(place), high = in_order(place + (1u << shift));
    keep(scores, weights, std::exchange(count, 0), low, high);
  }
  const float t = count == 1 ? scores[0] : std::max(bound, in_order(place));
  return {std::fabs(t) < FLT_MIN ? 0 : t, count == 1};  // some processors take subnormal numbers for zeros
}

// Keeps the smallest set of largest scores whose weights, or whose number, reach `need`; of equal scores the first.
template <bool kCounts>
inline void keep_largest(Row& row, float need, float bound) {
  need = std::max(need, FLT_MIN);
  const auto [least, unique] = threshold<kCounts>(row, need, bound);
  float reached = 0;
  for (int64_t part = 0; part < row.parts(); ++part) {
    if (row.highest[part] < least) {
      row.highest[part] = -INFINITY;
      row.mass[part] = 0;
      continue;
    }
    Floats kept = all(0.0f);
    for (int64_t j = part * kPart; j < (part + 1) * kPart; j += kLanes) {
      const Floats score = load(row.scores + j);
      const Floats weight = add_where(all(0.0f), score, all(least), load(&row.weights[j]));
      kept = add_where(kept, score, all(least), kCounts ? all(1.0f) : weight);
      store(&row.weights[j], weight);
    }
    reached += sum(kept);
    row.add_up(part);
  }
  for (int64_t part = row.parts() - 1; part >= 0 && !unique; --part) {
    if (row.highest[part] < least) continue;
    for (int64_t j = (part + 1) * kPart - 1; j >= part * kPart; --j) {
      if (row.scores[j] != least) continue;
      reached -= kCounts ? 1 : row.weights[j];
      if (reached < need) return;
      row.weights[j] = 0;
      row.add_up(part);
    }
  }
}

// The k largest scores are not below the k-th largest of the parts' own.
inline float bound_of_top_k(const Row& row, float k) {
  static thread_local std::vector<float> highest;
  if (k > row.parts()) return -INFINITY;
  highest = row.highest;
  const auto kth = highest.begin() + int64_t(k) - 1;
  std::nth_element(highest.begin(), kth, highest.end(), std::greater<>());
  return *kth;
}

// Row b's scores with bias and penalties. Copies them to `changed` if any changes, or if they are no whole parts.
inline const float* adjusted(const Draws& d, int64_t b, std::vector<float>& changed) {
  const DrawOptions& o = d.options[b];
  const float *logits = d.logits + b * d.count, *bias = d.bias + b * d.num_biases;
  const bool biased = std::any_of(bias, bias + d.num_biases, [](float x) { return x != 0; });
  const bool penalized = o.repetition_penalty != 1 || o.frequency_penalty != 0 || o.presence_penalty != 0;
  if (!biased && !penalized && d.count % kPart == 0) return logits;
  changed.assign((d.count + kPart - 1) / kPart * kPart, -INFINITY);
  std::copy(logits, logits + d.count, changed.begin());
  for (int64_t i = 0; biased && i < d.num_biases; ++i) {
    const int64_t token = d.bias_ids[b * d.num_biases + i];
    if (bias[i] != 0 && token >= 0 && token < d.count) changed[token] += bias[i];
  }
  const int32_t* counts = d.counts + b * d.count;
  const bool* in_prompt = d.in_prompt + b * d.count;
  float* x = changed.data();
  for (int64_t j = 0; penalized && j < d.count; ++j) {
    if (counts[j] == 0 && !in_prompt[j]) continue;
    x[j] = x[j] > 0 ? x[j] / o.repetition_penalty : x[j] * o.repetition_penalty;
    x[j] -= o.frequency_penalty * counts[j];
    if (counts[j] > 0) x[j] -= o.presence_penalty;
  }
  return changed.data();
}

// The token at which the running sum of the weights passes `target`; the last one with any if rounding keeps it below.
inline int32_t passes(const Row& row, double target) {
  double sum = 0, before = 0;
  int64_t in = 0, token = 0;
  for (int64_t part = 0; part < row.parts() && sum <= target; ++part) {
    if (row.mass[part] == 0) continue;
    in = part;
    before = sum;
    sum += row.mass[part];
  }
  sum = before;
  for (int64_t j = in * kPart; j < (in + 1) * kPart && sum <= target; ++j) {
    if (row.weights[j] > 0) token = j;
    sum += row.weights[j];
  }
  return int32_t(token);
}

// Finds each part's largest score. Returns whether none is NaN.
inline bool find_highest(Row& row, int64_t parts) {
  row.highest.resize(parts);
  Floats numbers = all(0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    Floats most = all(-INFINITY);
    for (int64_t j = part * kPart; j < (part + 1) * kPart; j += kLanes) {
      const Floats score = load(row.scores + j);
      most = max(score, most);
      numbers = add_where(numbers, score, all(-INFINITY), all(1.0f));
    }
    row.highest[part] = maximum(most);
  }
  return sum(numbers) == parts * kPart;
}

// Weighs scores after temperature and min-p: the largest one, `most`, has 1.
inline void weigh(Row& row, float most, const DrawOptions& o) {
  row.weights.resize(row.parts() * kPart);
  row.mass.resize(row.parts());
  const Floats scale = all(kLog2e / o.temperature), least = all(most + o.temperature * std::log(o.min_p));
  for (int64_t part = 0; part < row.parts(); ++part) {
    for (int64_t j = part * kPart; j < (part + 1) * kPart; j += kLanes) {
      const Floats score = load(row.scores + j);
      // 2^-200 is 0: of minus infinity, exp2 would be NaN.
      const Floats weight = exp2(max((score - all(most)) * scale, all(-200.0f)));
      store(&row.weights[j], add_where(all(0.0f), score, least, weight));
    }
    row.add_up(part);
  }
}

inline int32_t draw(const Draws& d, int64_t b) {
  static thread_local Row row;
  static thread_local std::vector<float> changed;
  const DrawOptions& o = d.options[b];
  row.scores = adjusted(d, b, changed);
  const bool ordered = find_highest(row, (d.count + kPart - 1) / kPart);
  const auto highest = std::max_element(row.highest.begin(), row.highest.end());
  const float most = *highest;
  if (!ordered || most == INFINITY) return int32_t(d.count);
  if (o.temperature == 0 || most == -INFINITY) {
    const float* part = row.scores + (highest - row.highest.begin()) * kPart;
    return int32_t(std::find(part, part + kPart, most) - row.scores);
  }
  weigh(row, most, o);
  if (o.top_k > 0) keep_largest<true>(row, o.top_k, bound_of_top_k(row, o.top_k));
  if (o.top_p < 1) {
    // Even if all tokens had a weight as at the bound, those below it would not make up half of what top-p drops.
    const double total = row.total(), need = total * o.top_p * (1 - kMassRounding);
    keep_largest<false>(row, need, most + o.temperature * std::log((total - need) / (2 * d.count)));
  }
  return passes(row, row.total() * o.uniform);
}

inline void sample(xla::ffi::ThreadPool& pool, const Draws& d) {
  parallel_for(pool, d.rows, 1, [&](int64_t b) { d.token[b] = draw(d, b); });
}

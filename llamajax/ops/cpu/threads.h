// Divides work among XLA's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

// [0, count) divided among threads, with work stealing. A thread takes from the front of its own range, so that it reads
// memory forward; when its range is empty, it takes half of what another thread has left, so that all end together.
class Ranges {
 public:
  Ranges(int64_t count, int64_t threads) : ranges_(threads) {
    for (int64_t i = 0; i < threads; ++i) ranges_[i].ends = pack(count * i / threads, count * (i + 1) / threads);
  }

  // Takes the next item for a thread. Returns its range from that item on: empty if no thread has any left.
  std::pair<int64_t, int64_t> take(int64_t thread) {
    std::atomic<uint64_t>& own = ranges_[thread].ends;
    do {
      uint64_t seen = own.load(std::memory_order_relaxed);
      while (begin(seen) < end(seen)) {
        const uint64_t rest = pack(begin(seen) + 1, end(seen));
        if (own.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) return {begin(seen), end(seen)};
      }
    } while (steal(thread));
    return {};
  }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> ends;
  };

  static uint64_t pack(uint64_t begin, uint64_t end) { return begin << 32 | end; }
  static int64_t begin(uint64_t ends) { return int64_t(ends >> 32); }
  static int64_t end(uint64_t ends) { return int64_t(ends & UINT32_MAX); }

  bool steal(int64_t thread) {
    for (Range& other : ranges_) {
      uint64_t seen = other.ends.load(std::memory_order_relaxed);
      while (begin(seen) < end(seen)) {
        const int64_t middle = begin(seen) + (end(seen) - begin(seen)) / 2;
        if (other.ends.compare_exchange_weak(seen, pack(begin(seen), middle), std::memory_order_relaxed)) {
          ranges_[thread].ends.store(pack(middle, end(seen)), std::memory_order_relaxed);
          return true;
        }
      }
    }
    return false;
  }

  std::vector<Range> ranges_;
};

// Calls task(i) for each i < count, `chunk` of them in a row at least, on the calling thread and those of the pool that
// are free; or task(i, end), where the same thread is to go on until `end`. Returns when all are done. A thread of the
// pool that comes late finds nothing left: the caller never waits for one to begin.
template <class Task>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, int64_t chunk, const Task& task) {
  struct Shared {
    const Task* task;
    int64_t count, chunk;
    Ranges chunks;
    std::atomic<int64_t> joined{0}, done{0};

    void work() {
      const int64_t thread = joined.fetch_add(1, std::memory_order_relaxed);
      int64_t finished = 0;
      for (;;) {
        const auto [next, last] = chunks.take(thread);
        if (next == last) break;
        run(*task, next * chunk, std::min((next + 1) * chunk, count), std::min(last * chunk, count));
        finished += std::min(chunk, count - next * chunk);
      }
      done.fetch_add(finished, std::memory_order_release);
    }
    static void run(const Task& task, int64_t i, int64_t until, int64_t end) {
      for (; i < until; ++i) {
        if constexpr (std::is_invocable_v<Task, int64_t, int64_t>) {
          task(i, end);
        } else {
          task(i);
        }
      }
    }
  };
  const int64_t chunks = (count + chunk - 1) / chunk, threads = std::min<int64_t>(pool.num_threads(), chunks);
  if (threads <= 1) return Shared::run(task, 0, count, count);
  const std::shared_ptr<Shared> shared(new Shared{&task, count, chunk, Ranges(chunks, threads)});
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([shared] { shared->work(); });
  shared->work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

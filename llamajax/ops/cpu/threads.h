// Work shared out over XLA's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

// Calls task(i) for each i < count, `chunk` of them in a row, on the calling thread and those of the pool that are
// free. Returns when all are done. A thread of the pool that comes late finds nothing left: the caller never waits for
// one to begin.
template <class Task>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, int64_t chunk, const Task& task) {
  struct Shared {
    const Task* task;
    int64_t count, chunk;
    std::atomic<int64_t> next{0}, done{0};

    void work() {
      for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < count;) {
        const int64_t end = std::min(begin + chunk, count);
        for (int64_t i = begin; i < end; ++i) (*task)(i);
        done.fetch_add(end - begin, std::memory_order_release);
      }
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), (count + chunk - 1) / chunk) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto shared = std::make_shared<Shared>();
  shared->task = &task;
  shared->count = count;
  shared->chunk = chunk;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->work(); });
  shared->work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

// See threads.h. The OpenMP runtime is looked up at run time by GOMP_parallel, the stable entry point of GCC's runtime
// that LLVM's and Intel's export too; it is never linked.
#include "step/threads.h"

#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#endif
#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#endif

namespace fusedopt {
namespace {

int positive_env(const char* name) {
  const char* s = getenv(name);
  int n = s ? atoi(s) : 0;
  return n > 0 ? n : 0;
}

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  int n = int(std::thread::hardware_concurrency());
  return n > 0 ? n : 1;
}

void relax() {
#if defined(__SSE2__) || defined(_M_X64)
  _mm_pause();
#endif
}

// Each thread takes the parts of its own share first, whose data its cache may still hold from the last step, then any
// part that no thread has taken yet.
struct Job {
  void (*fn)(void*, int);
  void* arg;
  int parts, threads;
  std::atomic<bool> taken[kMaxParts] = {};

  void work(int self) {
    const int first = parts / threads * self;
    for (int k = 0; k < parts; ++k) {
      int part = (first + k) % parts;
      if (!taken[part].load(std::memory_order_relaxed) && !taken[part].exchange(true, std::memory_order_relaxed))
        fn(arg, part);
    }
  }
};

// Workers that sleep between jobs. It runs one job at a time: a caller that finds the pool busy works alone. No caller
// waits for a worker that has not begun, since another library's threads may occupy its core.
class Pool {
 public:
  void run(Job& job) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return job.work(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; workers_ < job.threads - 1; ++workers_) std::thread([this, id = workers_ + 1] { serve(id); }).detach();
      } catch (const std::system_error&) {  // no more threads are available: use the existing ones
      }
      job_ = &job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
    }
    while (running_.load(std::memory_order_acquire) > 0) relax();
  }

 private:
  void serve(int id) {
    for (uint64_t seen = 0;;) {
      // With small arrays the next step follows within microseconds: spin for a while before sleeping.
      for (int i = 0; i < kLook && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (!job_ || id >= job_->threads) continue;
        job = job_;
        running_.fetch_add(1, std::memory_order_relaxed);
      }
      job->work(id);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  static constexpr int kLook = 2000;
  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> running_{0};
  Job* job_ = nullptr;
  int workers_ = 0;
};

// Never destroyed: workers may outlive main. A forked child has no workers and creates a new pool.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

Pool& the_pool() {
  Pool* p = pool.load();
  if (!p) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(p, fresh)) return *fresh;
    delete fresh;
  }
  return *p;
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();

template <class F>
F lookup(const char* name) {
#if defined(_WIN32)
  (void)name;
  return nullptr;
#else
  return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
#endif
}

std::atomic<GompParallel> gomp_parallel{nullptr};
std::atomic<ThreadNumber> omp_thread_number{nullptr};

// Looked up until found, since torch may be imported later. Not used in a forked child, where the runtime would wait
// for workers that exist only in the parent.
bool openmp() {
  if (forked.load(std::memory_order_relaxed)) return false;
  if (gomp_parallel.load(std::memory_order_acquire)) return true;
  auto number = lookup<ThreadNumber>("omp_get_thread_num");
  auto enter = lookup<GompParallel>("GOMP_parallel");
  if (!number || !enter) return false;
  omp_thread_number.store(number);
  gomp_parallel.store(enter);
  return true;
}

#if !defined(_WIN32)
const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true);
  pool.store(nullptr);
});
#endif

}  // namespace

int default_threads() {
  if (int ours = positive_env("FUSEDOPT_NUM_THREADS")) return ours;
  if (int omp = positive_env("OMP_NUM_THREADS")) return omp;
  return usable_processors();
}

void parallel(Team team, int threads, int parts, void (*fn)(void*, int), void* arg) {
  if (parts > kMaxParts) abort();
  Job job;
  job.fn = fn;
  job.arg = arg;
  job.parts = parts;
  job.threads = threads < parts ? threads : parts;
  if (job.threads <= 1) return job.work(0);
  if (team == Team::kOurs || !openmp()) return the_pool().run(job);
  gomp_parallel.load()([](void* j) { static_cast<Job*>(j)->work(omp_thread_number.load()()); }, &job,
                       unsigned(job.threads), 0);
  job.work(0);  // a nested region may have had fewer threads than asked for
}

const char* torch_team() { return openmp() ? "openmp" : "pool"; }

}  // namespace fusedopt

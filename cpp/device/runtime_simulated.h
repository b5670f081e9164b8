// The simulated runtime, for tests: what grid.h needs of a device, in the host's memory. The threads of a block are
// fibres of one host thread. Blocks run sequentially, the last first, since nothing may depend on their order. If the
// threads of a block diverge at a barrier, the process aborts. Of very large launches only the first and last blocks
// run, which allows tensors of more than 2^31 elements in memory that is reserved but not committed. A graph is a list
// of launches. POSIX only.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define FUSEDOPT_DEVICE inline
#define FUSEDOPT_KERNEL inline void
#define FUSEDOPT_BIG_KERNEL(threads) inline void
#define FUSEDOPT_UPDATE_KERNEL(blocks) inline void
#define FUSEDOPT_SHARED static
#define FUSEDOPT_ROLLED
#define FUSEDOPT_UNROLL

#include "device/device.h"

namespace fusedopt {

// State that the tests set and read; one for all parts of the library.
struct Simulation {
  bool capturing = false, failing = false, full = false;
  std::vector<std::function<void()>> launches;  // recorded since the capture began
  std::set<const void*> loaded;                 // kernels
  std::string log;                              // one line per call that tests check
  std::vector<int> current{0};                  // stack of current devices

  void note(const char* what) { log += std::string(what) + "\n"; }
  void note(const char* what, int64_t number) { log += std::string(what) + " " + std::to_string(number) + "\n"; }
};
inline Simulation& simulation() {
  static Simulation s;
  return s;
}
enum { kTold = 2, kFull = 3 };  // errors

// Memory that is not on device 0.
struct Elsewhere {
  const char *begin, *end;
  int device;
};
inline std::vector<Elsewhere>& elsewhere() {
  static std::vector<Elsewhere> list;
  return list;
}

namespace {

constexpr int kWarp = 32;

class Block {
 public:
  void run(int64_t block, int threads, const std::function<void()>& body) {
    body_ = &body;
    block_ = block;
    fibres_.resize(size_t(threads));
    values_.resize(size_t(threads));
    for (Fibre& f : fibres_) {
      if (f.stack.empty()) f.stack.resize(kStack);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = &home_;
      makecontext(&f.context, enter, 0);
      f.at = kRunning;
    }
    for (;;) {  // from barrier to barrier
      for (now_ = 0; now_ < threads; ++now_)
        if (fibres_[size_t(now_)].at == kRunning) swapcontext(&home_, &fibres_[size_t(now_)].context);
      const int done = count(0, threads, kDone), blocked = count(0, threads, kAtBlock);
      if (done == threads) return;
      bool stuck = blocked != 0 && blocked != threads;
      if (blocked == threads) release(0, threads);
      for (int w = 0; w < threads; w += kWarp) {
        const int end = w + kWarp < threads ? w + kWarp : threads, waiting = count(w, end, kAtWarp);
        if (waiting == end - w) {
          release(w, end);
          stuck = false;
        } else if (waiting) {
          fail(waiting, end - w);
        }
      }
      if (stuck) fail(blocked, threads);
    }
  }
  void barrier() { wait(kAtBlock); }
  int32_t value_of(int32_t x, int thread) {
    values_[size_t(now_)] = x;
    wait(kAtWarp);
    const int32_t other = values_[size_t(thread)];
    wait(kAtWarp);
    return other;
  }
  int32_t exchange(int32_t x, int distance) { return value_of(x, now_ ^ distance); }
  int64_t block() const { return block_; }
  int thread() const { return now_; }

 private:
  static constexpr size_t kStack = 64 * 1024;
  enum Where { kRunning, kAtWarp, kAtBlock, kDone };
  struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    Where at;
  };
  static void enter();
  int count(int begin, int end, Where where) const {
    int n = 0;
    for (int k = begin; k < end; ++k) n += fibres_[size_t(k)].at == where;
    return n;
  }
  void release(int begin, int end) {
    for (int k = begin; k < end; ++k) fibres_[size_t(k)].at = kRunning;
  }
  void wait(Where where) {
    fibres_[size_t(now_)].at = where;
    swapcontext(&fibres_[size_t(now_)].context, &home_);
  }
  [[noreturn]] static void fail(int waiting, int threads) {
    fprintf(stderr, "simulated device: %d of %d threads wait at a barrier that the others never reach\n", waiting,
            threads);
    abort();
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Fibre> fibres_;
  std::vector<int32_t> values_;
  ucontext_t home_;
  int64_t block_ = 0;
  int now_ = 0;
};

inline Block& running() {
  static Block block;
  return block;
}
inline void Block::enter() {
  Block& block = running();
  (*block.body_)();
  block.fibres_[size_t(block.now_)].at = kDone;
}

FUSEDOPT_DEVICE int64_t block_index() { return running().block(); }
FUSEDOPT_DEVICE int thread_index() { return running().thread(); }
FUSEDOPT_DEVICE void block_barrier() { running().barrier(); }
FUSEDOPT_DEVICE int32_t exchange(int32_t x, int distance) { return running().exchange(x, distance); }

FUSEDOPT_DEVICE int32_t value_of(int32_t x, int thread, int group) {
  return running().value_of(x, thread_index() / group * group + thread);
}
FUSEDOPT_DEVICE bool all_of_warp(bool x) {
  for (int distance = 1; distance < kWarp; distance *= 2) x = exchange(x, distance) && x;
  return x;
}
template <class T>
FUSEDOPT_DEVICE T* global(T* x) {
  return x;
}

constexpr int kFewWords = 4, kManyWords = 16;  // so that tests need several launches
inline bool many_words() { return true; }

constexpr int64_t kAllBlocks = 16384, kSomeBlocks = 16;

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  const std::function<void()> body = [=] { kernel(arguments...); };
  const auto all = [=] {
    static std::mutex one;
    std::lock_guard<std::mutex> lock(one);
    for (int64_t b = blocks - 1; b >= 0; --b)
      if (blocks <= kAllBlocks || b < kSomeBlocks || b >= blocks - kSomeBlocks) running().run(b, threads, body);
  };
  if (simulation().failing) return kTold;
  simulation().note("launch", int64_t(reinterpret_cast<intptr_t>(stream)));
  if (simulation().capturing) {
    simulation().launches.push_back(all);
  } else {
    all();
  }
  return 0;
}

template <class... Parameters>
int load(void (*kernel)(Parameters...)) {
  auto& loaded = simulation().loaded;
  const auto* at = reinterpret_cast<const void*>(kernel);
  if (simulation().full && !loaded.count(at)) return kFull;
  loaded.insert(at);
  return 0;
}

constexpr const char* kKind = "simulated";
constexpr int32_t kDeviceType = 1;  // DLPack's CPU
constexpr bool kStreams = false;
inline int number(const void* memory) {
  for (const Elsewhere& e : elsewhere())
    if (memory >= e.begin && memory < e.end) return e.device;
  return 0;
}
constexpr int (*kNumber)(const void*) = number;
constexpr int kOutOfMemory = kFull;

inline int enter(int device, bool* entered) {
  *entered = device != simulation().current.back();
  if (*entered) simulation().note("context", device);
  if (*entered) simulation().current.push_back(device);
  return 0;
}
inline int leave() {
  simulation().note("leave");
  simulation().current.pop_back();
  return 0;
}
inline int allocate(size_t bytes, void** memory) {
  if (simulation().full) return kFull;
  simulation().note("allocate");
  *memory = malloc(bytes);
  memset(*memory, 0xff, bytes);  // nothing may rely on zeros
  return 0;
}
inline int release(void* memory) {
  simulation().note("release");
  free(memory);
  return 0;
}
inline int upload(void* to, const void* from, size_t bytes, void*, bool apart) {
  if (simulation().capturing != apart) return 1;
  if (simulation().failing) return kTold;
  if (!apart) simulation().note("upload");
  memcpy(to, from, bytes);
  return 0;
}
inline int download(void* to, const void* from, size_t bytes, void*) {
  if (simulation().capturing) return 1;
  memcpy(to, from, bytes);
  return 0;
}
inline int capturing(void*, bool* yes) {
  *yes = simulation().capturing;
  return 0;
}
inline int synchronize(void* stream) {
  simulation().note("wait", int64_t(reinterpret_cast<intptr_t>(stream)));
  return 0;
}
inline const char* message(int error) {
  return error == kTold ? "told to fail" : error == kFull ? "out of memory" : "not while a graph is being captured";
}

}  // namespace
}  // namespace fusedopt

// Instantiates grid.h for the rules with number modulo FUSEDOPT_PARTS equal to FUSEDOPT_PART; part 0 exports the one
// function of the library. Compiled by nvcc for the CUDA library, and as C++ for the simulated device.
#ifdef __CUDACC__
#include "device/runtime_cuda.h"
#else
#include "device/runtime_simulated.h"
#endif
#include "device/grid.h"

namespace fusedopt {
namespace {

template <class U>
int launch_prepare(const void*, const DeviceTables& t, int64_t first, int64_t rows, void* stream) {
  return launch(prepare<U>, (rows + kThreads - 1) / kThreads, kThreads, stream, t, first, rows);
}
template <class U>
int launch_update(const void*, const DeviceTables& t, int64_t first_row, int64_t rows, int64_t first_chunk,
                  int64_t chunks, void* stream) {
  return launch(update<U>, chunks, kThreads, stream, t, first_row, rows, first_chunk);
}
template <class U>
int launch_update_plain(const void*, const DeviceTables& t, int64_t first_row, int64_t rows, int64_t first_chunk,
                        int64_t chunks, void* stream) {
  return launch(update_plain<U>, chunks, kThreads, stream, t, first_row, rows, first_chunk);
}

template <class U>
int load_all(const void*) {
  int error = load(prepare<typename U::Alone>);
  if (!error) error = load(update_plain<U>);
  return error ? error : load(update<U>);
}

template <class U>
constexpr DeviceKernel device_kernel() {
  if constexpr (U::exists) {
    return {nullptr, launch_prepare<typename U::Alone>, launch_update<U>, launch_update_plain<U>, load_all<U>};
  } else {
    return {nullptr, nullptr, nullptr, nullptr, nullptr};
  }
}

template <template <class> class R>
struct KernelsOf {
#define KERNEL(W, G, S) device_kernel<Update<R<W::Weight::Number>, W, G, S>>(),
  static constexpr DeviceKernel all[] = {FUSEDOPT_FORMATS(KERNEL)};
#undef KERNEL
};
template <template <class> class R>
constexpr DeviceKernel KernelsOf<R>::all[];

template <template <class> class R, int number>
const DeviceKernel* of_this_part() {
  if constexpr (number % FUSEDOPT_PARTS == FUSEDOPT_PART) {
    return KernelsOf<R>::all;
  } else {
    return nullptr;
  }
}

}  // namespace

// The kernels of one rule, by form; nullptr if they are in another part.
const DeviceKernel* FUSEDOPT_CAT(grid_part_, FUSEDOPT_PART)(int rule) {
#define PART(name, R) \
  if (rule == name##_number) return of_this_part<R, name##_number>();
  FUSEDOPT_RULES(PART)
#undef PART
  return nullptr;
}

#if FUSEDOPT_PART == 0
const DeviceKernel* grid_part_1(int rule);
const DeviceKernel* grid_part_2(int rule);
const DeviceKernel* grid_part_3(int rule);

namespace {

const DeviceKernel* kernels(int rule) {
  for (auto part : {grid_part_0, grid_part_1, grid_part_2, grid_part_3})
    if (const DeviceKernel* found = part(rule)) return found;
  return nullptr;
}

template <int size>
int write(uint64_t* to, const uint64_t* words, int n, void* stream) {
  Words<size> some;
  memcpy(some.word, words, sizeof(uint64_t) * size_t(n));
  return launch(write_words<size>, (n + kThreads - 1) / kThreads, kThreads, stream, to, some, n);
}
int patch(uint64_t* to, const uint64_t* words, int64_t n, void* stream) {
  int error = 0;
  for (int64_t done = 0, count; done < n && !error; done += count) {
    const bool many = n - done > kFewWords && many_words();
    count = n - done < (many ? kManyWords : kFewWords) ? n - done : many ? kManyWords : kFewWords;
    error = (many ? write<kManyWords> : write<kFewWords>)(to + done, words + done, int(count), stream);
  }
  return error;
}

// Kernels that a captured step may launch and the steps before it have not.
int ready() {
  int error = load(write_words<kFewWords>);
  if (!error && many_words()) error = load(write_words<kManyWords>);
  if (!error) error = load(sum_chunks);
  if (!error) error = load(sum_rows);
  return error ? error : load(sum_all);
}

int norm(const DeviceTables& t, int64_t rows, int64_t chunks, void* stream) {
  int error = launch(sum_chunks, chunks, kNormThreads, stream, t, rows);
  if (!error) error = launch(sum_rows, rows, kTreeThreads, stream, t);
  return error ? error : launch(sum_all, 1, kTreeThreads, stream, t, rows);
}

const DeviceTable device = {kKind,    kDeviceType, kStreams, kOutOfMemory, kernels,     kNumber,
                            enter,    leave,       ready,    allocate,     release,     upload,
                            download, patch,       norm,     capturing,    synchronize, message};
const KernelLibrary library = {FUSEDOPT_VERSION, kDeviceSize, kKind, rules, kRules, forms, kForms, nullptr, &device};

}  // namespace
#endif

}  // namespace fusedopt

#if FUSEDOPT_PART == 0
#if defined(_WIN32)
extern "C" __declspec(dllexport)
#else
extern "C" __attribute__((visibility("default")))
#endif
const fusedopt::KernelLibrary* fusedopt_kernel_library() {
  return &fusedopt::library;
}
#ifndef __CUDACC__
#define FUSEDOPT_FOR_TESTS extern "C" __attribute__((visibility("default")))
// `capturing`: launches are recorded for fusedopt_replay(); `failing`: launches and copies fail; `full`: allocations
// fail.
FUSEDOPT_FOR_TESTS void fusedopt_simulate(bool capturing, bool failing, bool full) {
  fusedopt::Simulation& s = fusedopt::simulation();
  if (capturing && !s.capturing) s.launches.clear();
  s.capturing = capturing;
  s.failing = failing;
  s.full = full;
}
FUSEDOPT_FOR_TESTS void fusedopt_forget() { fusedopt::simulation() = {}; }
FUSEDOPT_FOR_TESTS void fusedopt_replay() {
  for (auto& launch : fusedopt::simulation().launches) launch();
}
// The calls of the device since the last call of this function.
FUSEDOPT_FOR_TESTS const char* fusedopt_log() {
  static std::string last;
  last.clear();
  last.swap(fusedopt::simulation().log);
  return last.c_str();
}
// Assigns memory to a device other than 0, or to the host (-1); zero bytes: all memory is on device 0 again.
FUSEDOPT_FOR_TESTS void fusedopt_place(const char* begin, int64_t bytes, int device) {
  if (bytes == 0) fusedopt::elsewhere().clear();
  fusedopt::elsewhere().push_back({begin, begin + bytes, device});
}
#endif
#endif

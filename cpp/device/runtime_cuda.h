// CUDA's runtime: what grid.h needs of a device, and the functions of DeviceTable that launch no kernel.
#pragma once
#include <cuda.h>  // for types; the driver's functions are looked up at run time
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#define FUSEDOPT_DEVICE __device__ inline
#define FUSEDOPT_KERNEL __global__ void
#define FUSEDOPT_BIG_KERNEL(threads) \
  __global__ void __launch_bounds__(threads)  // so many threads that registers are scarce
// At least `blocks` blocks of kThreads fit on a multiprocessor, which bounds the registers.
#define FUSEDOPT_UPDATE_KERNEL(blocks) __global__ void __launch_bounds__(kThreads, blocks)
#define FUSEDOPT_SHARED __shared__
#define FUSEDOPT_ROLLED _Pragma("unroll 1")
#define FUSEDOPT_UNROLL _Pragma("unroll")

#include "device/device.h"

namespace fusedopt {
namespace {

FUSEDOPT_DEVICE int64_t block_index() { return blockIdx.x; }
FUSEDOPT_DEVICE int thread_index() { return int(threadIdx.x); }
FUSEDOPT_DEVICE void block_barrier() { __syncthreads(); }
constexpr int kWarp = 32;
// All threads of a warp must call these. The value of the thread whose number differs by this power of 2;
FUSEDOPT_DEVICE int32_t exchange(int32_t x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
// the value of a thread, by its number in a group of `width` neighbours;
FUSEDOPT_DEVICE int32_t value_of(int32_t x, int thread, int group) {
  return __shfl_sync(0xffffffffu, x, thread, group);
}
// whether it is true for all.
FUSEDOPT_DEVICE bool all_of_warp(bool x) { return __all_sync(0xffffffffu, x); }
// Tells the compiler that a pointer read from memory points to global memory: otherwise accesses would be generic.
template <class T>
FUSEDOPT_DEVICE T* global(T* x) {
  __builtin_assume(__isGlobal(x));
  return x;
}

// Words that fit into the arguments of a launch: of any driver, and since CUDA 12.1.
constexpr int kFewWords = 480, kManyWords = CUDART_VERSION >= 12010 ? 4000 : kFewWords;
inline bool many_words() {
#if CUDART_VERSION >= 12010
  static const bool yes = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return yes;
#else
  return false;
#endif
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  void* list[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)), list,
                          0, static_cast<cudaStream_t>(stream));
}

// Also allowed during capture: the allocation is no part of the graph.
struct Relaxed {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// Loads a kernel before a graph that contains it is captured.
template <class... Parameters>
int load(void (*kernel)(Parameters...)) {
  Relaxed relaxed;
  cudaFuncAttributes ignored;
  return cudaFuncGetAttributes(&ignored, reinterpret_cast<const void*>(kernel));
}

constexpr const char* kKind = "cuda";
constexpr int32_t kDeviceType = 2;
constexpr bool kStreams = true;
constexpr int (*kNumber)(const void*) = nullptr;

constexpr int kOutOfMemory = cudaErrorMemoryAllocation;

// A function of the driver, or nullptr.
template <class Function>
Function of_driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess ? reinterpret_cast<Function>(found) : nullptr;
}

// Uses the driver's stack of contexts, since restoring a device by cudaSetDevice() would create a context (some hundred
// MB) on a device that is not in use.
inline int enter(int device, bool* entered) {
  static std::mutex one;
  static std::map<int, CUcontext> contexts;  // never destroyed, like the runtime's own
  *entered = false;
  int now = 0;
  if (const cudaError_t error = cudaGetDevice(&now); error != cudaSuccess || now == device) return error;
  static const auto retain = of_driver<CUresult (*)(CUcontext*, CUdevice)>("cuDevicePrimaryCtxRetain");
  static const auto push = of_driver<CUresult (*)(CUcontext)>("cuCtxPushCurrent");
  if (!retain || !push) return cudaErrorSymbolNotFound;
  std::lock_guard<std::mutex> lock(one);
  CUcontext& context = contexts[device];
  CUresult error = context ? CUDA_SUCCESS : retain(&context, device);
  if (error == CUDA_SUCCESS) error = push(context);
  *entered = error == CUDA_SUCCESS;
  return int(error);  // errors of driver and runtime have the same numbers
}
inline int leave() {
  static const auto pop = of_driver<CUresult (*)(CUcontext*)>("cuCtxPopCurrent");
  CUcontext ignored;
  return pop ? int(pop(&ignored)) : int(cudaErrorSymbolNotFound);
}

inline int allocate(size_t bytes, void** memory) {
  Relaxed relaxed;
  return cudaMalloc(memory, bytes);
}
inline int release(void* memory) {
  Relaxed relaxed;
  return cudaFree(memory);
}
inline int upload(void* to, const void* from, size_t bytes, void* stream, bool apart) {
  auto s = static_cast<cudaStream_t>(stream);
  Relaxed relaxed;
  cudaError_t error = apart ? cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking) : cudaSuccess;
  if (error) return error;
  error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, s);
  if (!error) error = cudaStreamSynchronize(s);
  if (apart) cudaStreamDestroy(s);
  return error;
}
inline int download(void* to, const void* from, size_t bytes, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, s);
  return error ? error : cudaStreamSynchronize(s);
}
inline int capturing(void* stream, bool* yes) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *yes = status != cudaStreamCaptureStatusNone;
  return error;
}
inline int synchronize(void* stream) { return cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); }
inline const char* message(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace
}  // namespace fusedopt

// See device.h.
#include "step/device.h"

#include <stddef.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "cpu/dispatch.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace fusedopt {
namespace {

std::mutex opening;
std::string path, refusal;
std::atomic<const DeviceTable*> opened{nullptr};
bool tried = false;

using Entry = const KernelLibrary* (*)();

Entry entry_of(const std::string& file, std::string* why) {
#if defined(_WIN32)
  HMODULE module = LoadLibraryA(file.c_str());
  if (!module) *why = "Windows error " + std::to_string(GetLastError());
  return module ? reinterpret_cast<Entry>(GetProcAddress(module, "fusedopt_kernel_library")) : nullptr;
#else
  void* module = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!module) *why = dlerror();
  return module ? reinterpret_cast<Entry>(dlsym(module, "fusedopt_kernel_library")) : nullptr;
#endif
}

std::string failure(int error, const char* doing) {
  return std::string(device_library()->kind) + " error " + std::to_string(error) + " while " + doing + ": " +
         device_library()->message(error);
}
// Checks a call before the first launch of a step.
void check(int error, const char* doing) {
  if (error && error == device_library()->out_of_memory) throw DeviceOutOfMemory(failure(error, doing));
  if (error) throw std::runtime_error(failure(error, doing));
}
// Checks a launch, after which the step cannot be repeated.
void check_launch(int error, const char* doing) {
  if (error) throw std::runtime_error(failure(error, doing));
}

// Makes a device current during its lifetime.
struct Turn {
  bool entered = false;
  int error;
  explicit Turn(int device) : error(device_library()->enter(device, &entered)) {}
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() {
    if (entered) device_library()->leave();
  }
};

// The same; does nothing if the device cannot be made current.
struct SureTurn : Turn {
  explicit SureTurn(int device) : Turn(device) { check(error, "choosing the device"); }
};

// Memory of destroyed plans, by device. Freeing synchronises with the device, which must be current, and a destructor
// may run anywhere; so the next plan that allocates on the device frees it.
struct Left {
  std::mutex mutex;
  std::map<int, std::vector<void*>> memory;
};
Left& left() {
  static Left* const kept = new Left;  // never destroyed: outlives every plan
  return *kept;
}
void free_left(int device) {
  std::lock_guard<std::mutex> lock(left().mutex);
  auto& memory = left().memory[device];
  for (; !memory.empty(); memory.pop_back()) check(device_library()->release(memory.back()), "freeing memory");
}

constexpr size_t kGap = 512;          // unchanged words between two changes that are uploaded with them
constexpr size_t kCopyFrom = 32'000;  // words; from here on a copy, which synchronises the stream

constexpr size_t words_of(size_t bytes) { return (bytes + 7) / 8; }

template <class T>
void put(std::vector<uint64_t>& words, size_t at, const T& x) {
  static_assert(sizeof(T) % 8 == 0, "whole words");
  memcpy(&words[at], &x, sizeof x);
}

}  // namespace

void set_device_library(const std::string& file) {
  std::lock_guard<std::mutex> lock(opening);
  path = file;
  refusal.clear();
  opened = nullptr;
  tried = false;
}

const DeviceTable* device_library(std::string* why) {
  std::lock_guard<std::mutex> lock(opening);
  if (!tried) {
    tried = true;
    if (path.empty()) {
      refusal = "this fusedopt was built without CUDA: pip install it with -C cmake.define.FUSEDOPT_CUDA=ON";
    } else if (Entry entry = entry_of(path, &refusal)) {
      const KernelLibrary* found = entry();
      if (strcmp(found->version, FUSEDOPT_VERSION) != 0 || found->size != kDeviceSize || !found->device ||
          found->n_rules != library().n_rules || found->n_forms != library().n_forms) {
        refusal = path + " belongs to another build of fusedopt, " + found->version;
      } else {
        opened = found->device;
      }
    } else if (refusal.empty()) {
      refusal = path + " is no library of fusedopt's";
    }
  }
  if (why) *why = refusal;
  return opened;
}

const DeviceTable* open_device_library() { return opened.load(std::memory_order_relaxed); }

std::string device_trouble(int device) {
  Turn turn(device);
  const int error = turn.error ? turn.error : device_library()->ready();
  if (error == device_library()->out_of_memory) check(error, "loading kernels");
  return error ? std::string("its kernels do not run there: ") + device_library()->message(error) : std::string();
}

bool device_capturing(int device, void* stream) {
  SureTurn turn(device);
  bool yes = false;
  check(device_library()->capturing(stream, &yes), "asking whether a graph is being captured");
  return yes;
}

DeviceStep::~DeviceStep() {
  if (!memory_) return;
  std::lock_guard<std::mutex> lock(left().mutex);
  left().memory[device_].push_back(memory_);
}

void DeviceStep::wait(void* stream) {
  SureTurn turn(device_);
  check(device_library()->synchronize(stream), "waiting for the update");
}

const DeviceKernel& DeviceStep::kernel_of(const Launch& l) {
  return device_library()->kernels(l.kernel.rule)[l.kernel.form];
}

// Fills words_ and launches_. Tensors are sorted by kernel, so that each kernel is one launch.
void DeviceStep::describe(const std::vector<Group>& groups, const Scaling& s) {
  const size_t n = tensors.size();
  order_.resize(n);
  std::iota(order_.begin(), order_.end(), size_t(0));
  auto id_of = [&](size_t t) { return std::make_pair(tensors[t].kernel.rule, tensors[t].kernel.form); };
  auto before = [&](size_t a, size_t b) { return id_of(a) < id_of(b); };
  if (!std::is_sorted(order_.begin(), order_.end(), before)) std::stable_sort(order_.begin(), order_.end(), before);

  groups_at_ = words_of(sizeof(DeviceHead));
  grads_at_ = groups_at_ + groups.size() * words_of(sizeof(DeviceGroup));
  firsts_at_ = grads_at_ + n;
  rows_at_ = firsts_at_ + n;
  const size_t layouts_at = rows_at_ + n * words_of(sizeof(DeviceRow));
  described_ = layouts_at;
  for (const Tensor& t : tensors)
    if (t.strided) described_ += 1 + size_t(t.strided->ndim) * size_t(1 + t.strided->n);
  words_.assign(described_, 0);

  put(words_, 0,
      DeviceHead{static_cast<const float*>(s.found_inf.at), static_cast<const float*>(s.grad_scale.at), s.unscale,
                 s.max_norm, s.norm.at, s.norm.wide});
  for (size_t g = 0; g < groups.size(); ++g) {
    const Group& from = groups[g];
    DeviceGroup to{};
    if (from.hyper.size() > kMaxHyper) throw std::length_error("a rule with more hyperparameters than a group holds");
    std::copy(from.hyper.begin(), from.hyper.end(), to.hyper);
    to.lr = from.lr.at;
    to.lr_wide = from.lr.wide;
    to.maximize = from.maximize;
    to.l1 = from.l1;
    to.ema_weight = from.ema_weight;
    to.seed = from.seed;
    put(words_, groups_at_ + g * words_of(sizeof to), to);
  }
  launches_.clear();
  chunks_ = 0;
  size_t layout = layouts_at;
  for (size_t at = 0; at < n; ++at) {
    const Tensor& t = tensors[order_[at]];
    const Span& span = t.span;
    DeviceRow to{};
    to.param = span.param;
    uintptr_t all = reinterpret_cast<uintptr_t>(span.param) | reinterpret_cast<uintptr_t>(span.grad) |
                    reinterpret_cast<uintptr_t>(span.residual) | reinterpret_cast<uintptr_t>(span.ema);
    for (int k = 0; k < kMaxStates; ++k) {
      to.state[k] = span.state[k];
      to.scale[k] = span.scale[k];
      all |= reinterpret_cast<uintptr_t>(span.state[k]);
    }
    to.residual = span.residual;
    to.ema = span.ema;
    to.n = span.n;
    if (const Strided* l = t.strided) {
      to.layout = layout;
      words_[layout++] = uint64_t(l->ndim);
      for (int d = 0; d < l->ndim; ++d) words_[layout++] = uint64_t(l->shape[d]);
      for (int o = 0; o < l->n; ++o)
        for (int d = 0; d < l->ndim; ++d) words_[layout++] = uint64_t(l->stride[o][d]);
    }
    to.vector = all % 16 == 0 && !t.strided;
    to.group = uint64_t(t.group);
    to.step = t.step.at;
    to.carry = t.carry.at;
    to.step_wide = t.step.wide;
    to.carry_wide = t.carry.wide;
    to.done = t.clock.t;
    to.sequence = t.sequence;
    to.grad = uint64_t(form_of(t.kernel).grad);
    to.place = int64_t(order_[at]);
    put(words_, rows_at_ + at * words_of(sizeof to), to);
    words_[grads_at_ + at] = reinterpret_cast<uintptr_t>(span.grad);
    words_[firsts_at_ + at] = uint64_t(chunks_);
    if (at == 0 || id_of(order_[at]) != id_of(order_[at - 1]))
      launches_.push_back({t.kernel, int64_t(at), 0, chunks_, 0, true});
    Launch& launch = launches_.back();
    ++launch.rows;
    launch.plain = launch.plain && to.vector && !to.ema && groups[size_t(t.group)].l1 == 0;
    const int64_t chunks = (span.n + kChunk - 1) / kChunk;
    launch.chunks += chunks;
    chunks_ += chunks;
  }
}

size_t DeviceStep::done_at(size_t row) const {
  return rows_at_ + row * words_of(sizeof(DeviceRow)) + offsetof(DeviceRow, done) / 8;
}

DeviceTables DeviceStep::tables(char* memory) const {
  auto* w = reinterpret_cast<uint64_t*>(memory);
  DeviceTables t{};
  t.words = reinterpret_cast<const int64_t*>(w);
  t.head = reinterpret_cast<DeviceHead*>(w);
  t.groups = reinterpret_cast<const DeviceGroup*>(w + groups_at_);
  t.grads = reinterpret_cast<const void* const*>(w + grads_at_);
  t.firsts = reinterpret_cast<const int64_t*>(w + firsts_at_);
  t.rows = reinterpret_cast<DeviceRow*>(w + rows_at_);
  t.ready = reinterpret_cast<DeviceReady*>(w + (described_ + 1) / 2 * 2);  // aligned to 16
  t.chunk_sums = reinterpret_cast<double*>(t.ready + tensors.size());
  t.row_sums = t.chunk_sums + chunks_;
  t.norm = t.row_sums + tensors.size();
  return t;
}

// Allocates the memory of tables(), and loads kernels that may be captured in a graph.
char* DeviceStep::allocate(size_t bytes) const {
  const DeviceTable& device = *device_library();
  check(device.ready(), "loading kernels");
  for (const Launch& l : launches_) check(kernel_of(l).load(kernel_of(l).self), "loading kernels");
  void* memory = nullptr;
  check(device.allocate(bytes, &memory), "allocating memory");
  return static_cast<char*>(memory);
}

// Updates the description on the device and returns where it is.
DeviceTables DeviceStep::send(void* stream) {
  const DeviceTable& device = *device_library();
  bool graph = false;
  check(device.capturing(stream, &graph), "asking whether a graph is being captured");
  const size_t needed = size_t(reinterpret_cast<uintptr_t>(tables(nullptr).norm + 1));
  if (graph) {  // A replay needs the description it was captured with: memory of its own, never freed.
    char* memory = allocate(needed);
    const int error = device.upload(memory, words_.data(), 8 * words_.size(), stream, true);
    if (error) device.release(memory);
    check(error, "describing the tensors");
    return tables(memory);
  }
  bool fresh = !known_ || there_.size() != words_.size();
  known_ = false;  // until the upload is complete
  if (needed > bytes_) {
    free_left(device_);
    if (memory_) check(device.release(memory_), "freeing memory");
    memory_ = nullptr;
    bytes_ = 0;
    memory_ = allocate(needed + needed / 4);
    bytes_ = needed + needed / 4;
    fresh = true;
  }
  std::vector<std::pair<size_t, size_t>> changed;  // ranges, joined across short gaps
  size_t total = words_.size();
  if (fresh) {
    changed = {{0, total}};
  } else {
    total = 0;
    for (size_t r = 0; r < tensors.size(); ++r)
      if (tensors[order_[r]].device_counts)
        there_[done_at(r)] = words_[done_at(r)];  // the device's count is the valid one
    for (size_t i = 0; i < words_.size(); ++i) {
      if (words_[i] == there_[i]) continue;
      if (changed.empty() || i - changed.back().second > kGap) changed.push_back({i, i});
      total += i + 1 - changed.back().second;
      changed.back().second = i + 1;
    }
  }
  auto* to = reinterpret_cast<uint64_t*>(memory_);
  if (total > kCopyFrom) {
    check(device.upload(to, words_.data(), 8 * words_.size(), stream, false), "describing the tensors");
  } else {
    for (auto [first, last] : changed)
      check(device.patch(to + first, &words_[first], int64_t(last - first), stream), "describing the tensors");
  }
  there_.swap(words_);
  known_ = true;
  for (size_t r = 0; r < tensors.size(); ++r)
    if (!tensors[order_[r]].device_counts) ++there_[done_at(r)];  // as the device will do
  return tables(memory_);
}

double DeviceStep::norm(const std::vector<Group>& groups, void* stream) {
  if (tensors.empty()) return 0;
  SureTurn turn(device_);
  describe(groups, {});
  const DeviceTables t = send(stream);
  check(device_library()->norm(t, int64_t(tensors.size()), chunks_, stream), "starting the norm");
  double norm;
  check(device_library()->download(&norm, t.norm, sizeof norm, stream), "reading the norm");
  return norm;
}

void DeviceStep::run(const std::vector<Group>& groups, const Scaling& scaling, void* stream) {
  if (tensors.empty()) return;
  SureTurn turn(device_);
  const DeviceTable& device = *device_library();
  describe(groups, scaling);
  try {
    const DeviceTables t = send(stream);
    if (scaling.max_norm > 0)
      check_launch(device.norm(t, int64_t(tensors.size()), chunks_, stream), "starting the norm");
    for (const Launch& l : launches_)
      check_launch(kernel_of(l).prepare(kernel_of(l).self, t, l.row, l.rows, stream), "starting the update");
    for (const Launch& l : launches_)
      check_launch((l.plain ? kernel_of(l).update_plain : kernel_of(l).update)(kernel_of(l).self, t, l.row, l.rows,
                                                                               l.chunk, l.chunks, stream),
                   "starting the update");
  } catch (...) {
    known_ = false;
    throw;
  }
  for (const Tensor& t : tensors)
    if (t.done) ++*t.done;
}

}  // namespace fusedopt

// A pretended accelerator for a torch that was built without one; README.md says what it shows and what not.
//
// `start` takes over one of torch's own device types, "cuda" or "mps". Its memory is the host's and every operator runs there,
// by the CPU's kernel on the same memory (`run_on_host`), after it has been refused what the real device refuses.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <mutex>
#include <sstream>
#include <unordered_set>

namespace {

using at::Tensor;
using Names = std::unordered_set<std::string>;

c10::DeviceType kind;
c10::DispatchKey key;
Names missing;              // operators that the device has no kernel for
Names takes_host_scalars;   // operators that take one 0-d tensor of the host beside the device's
void (*waited)(const char* why, const char* what) = nullptr;

c10::Device simulated() { return {kind, 0}; }
bool on_device(const Tensor& t) { return t.defined() && t.device().type() == kind; }

void wait(const char* why, const std::string& what) {
  if (waited) waited(why, what.c_str());
}

// ---- memory

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (data) memset(data, 0xff, bytes);  // NaN in every floating point type: what is read unwritten is seen
    return {data, data, &c10::free_cpu, simulated()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
DeviceMemory device_memory;

struct PinnedMemory final : c10::Allocator {
  static inline std::mutex lock;
  static inline std::unordered_set<const void*> blocks;
  static void release(void* data) {
    std::lock_guard guard(lock);
    blocks.erase(data);
    c10::free_cpu(data);
  }
  static bool holds(const void* data) {
    std::lock_guard guard(lock);
    return blocks.count(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    std::lock_guard guard(lock);
    if (data) blocks.insert(data);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

Tensor like(const Tensor& t, c10::Storage storage, c10::DispatchKey backend) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(backend), t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return result;
}

// A tensor of the host in the memory of a device's; a kernel that makes it larger gives it memory of its own.
Tensor on_host(const Tensor& t) {
  if (!on_device(t)) return t;
  c10::DataPtr data(t.storage().mutable_data(), c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  return like(t, std::move(storage), c10::DispatchKey::CPU);
}

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      kind != c10::kMPS || (dtype != at::kDouble && dtype != at::kComplexDouble),
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.");
}

c10::Storage taken(const Tensor& host) {
  auto* owner = new c10::Storage(host.storage());
  c10::DataPtr data(owner->mutable_data(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, simulated());
  return {c10::Storage::use_byte_size_t(), host.storage().nbytes(), std::move(data), &device_memory, true};
}

// What a kernel has made is the device's from now on.
Tensor to_device(const Tensor& host) {
  if (!host.defined() || on_device(host)) return host;
  check_dtype(host.scalar_type());
  return like(host, taken(host), key);
}

// A tensor that a kernel has written by way of `host`: where that was made larger its memory is the tensor's now.
void settle(const Tensor& t, const Tensor& host) {
  if (host.storage().data() != t.storage().data()) t.unsafeGetTensorImpl()->set_storage_keep_dtype(taken(host));
  if (host.sizes() != t.sizes() || host.strides() != t.strides())
    t.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
}

// ---- random numbers: a stream of the device's own

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator host;
  explicit DeviceGenerator(at::Generator host)
      : c10::GeneratorImpl(simulated(), c10::DispatchKeySet(key)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(host.clone()); }
};

at::Generator new_generator() { return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator()); }

at::Generator& default_generator() {
  static at::Generator generator = new_generator();
  return generator;
}
bool share_default = false;  // the next generator that is asked for is the default one: so Python gets hold of it

at::Generator of_host(const std::optional<at::Generator>& generator) {
  auto chosen = generator && generator->defined() ? *generator : default_generator();
  TORCH_CHECK(
      chosen.device().type() == kind, "Expected a '", kind, "' device type for generator but found '", chosen.device().type(), "'");
  return static_cast<DeviceGenerator*>(chosen.unsafeGetGeneratorImpl())->host;
}

// ---- what torch asks of a device

template <class Interface>
struct Hooks : Interface {
  using Interface::Interface;
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return simulated(); }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return std::exchange(share_default, false) ? default_generator() : new_generator();
  }
};

struct CUDAHooks final : Hooks<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override { wait("synchronize", "deviceSynchronize"); }
};

struct MPSHooks final : Hooks<at::MPSHooksInterface> {
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  void deviceSynchronize() const override { wait("synchronize", "deviceSynchronize"); }
  void emptyCache() const override {}
};

// One device, one stream; an event is over as soon as it is recorded.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, simulated()); }
  c10::DeviceType type() const override { return kind; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return simulated(); }
  c10::Device exchangeDevice(c10::Device) const override { return simulated(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static char recorded;
    *event = &recorded;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

// ---- operators that are not the host's kernel on the same memory

Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  check_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, &device_memory, c10::DispatchKeySet(key), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  check_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(
      size, stride, &device_memory, c10::DispatchKeySet(key), c10::dtype_or_default(dtype));
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  // CUDA goes on at once only where it may read or write the host's memory later: where that is pinned
  auto blocks = [&](const Tensor& host) { return !non_blocking || (kind == c10::kCUDA && !PinnedMemory::holds(host.storage().data())); };
  if (on_device(from) && !on_device(to) && blocks(to)) wait("copy to the host", "copy_");
  if (on_device(to) && !on_device(from) && blocks(from)) wait("copy to the device", "copy_");
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy(target, from, non_blocking);
}

at::Scalar item(const Tensor& t) {
  wait("copy to the host", "item");
  return on_host(t).item();
}

const Tensor& resize(const Tensor& t, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  Tensor host = on_host(t);
  host.resize_(size, format);
  settle(t, host);
  return t;
}

Tensor& set_storage(Tensor& t, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.size() == size.size() && !size.empty()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  }
  return t;
}

Tensor& set_whole_storage(Tensor& t, at::Storage storage) {
  int64_t count = storage.nbytes() / t.element_size();
  return set_storage(t, std::move(storage), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& t, const Tensor& source) {
  return set_storage(t, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor as_strided(const Tensor& t, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}

Tensor view_as_real(const Tensor& t) {
  auto sizes = t.sizes().vec(), strides = t.strides().vec();
  for (auto& stride : strides) stride *= 2;
  sizes.push_back(2);
  strides.push_back(1);
  auto type = c10::scalarTypeToTypeMeta(c10::toRealValueType(t.scalar_type()));
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(), type);
  result.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, t.storage_offset() * 2);
  return result;
}

// The CPU's kernel draws from the CPU's generator.
std::tuple<Tensor, Tensor> dropout(const Tensor& x, double p, std::optional<bool> train) {
  if (!train.value_or(true)) return {x.clone(), at::ones_like(x, at::kBool)};
  Tensor mask = at::empty_like(x, at::kBool).bernoulli_(1 - p);
  return {at::mul(at::mul(x, mask), p < 1 ? 1 / (1 - p) : 0), mask};
}

int64_t choose_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // the plain formula: fused kernels are the real device's
}

Tensor mps_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout, bool causal,
    std::optional<double> scale, bool grouped) {
  return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, {}, scale, grouped));
}

std::tuple<Tensor, Tensor, Tensor> mps_linear_backward(
    const Tensor& x, const Tensor& grad, const Tensor& weight, std::array<bool, 3> wanted) {
  Tensor rows = grad.reshape({-1, grad.size(-1)});
  return {
      wanted[0] ? at::matmul(grad, weight) : Tensor(),
      wanted[1] ? at::matmul(rows.t(), x.reshape({-1, x.size(-1)})) : Tensor(),
      wanted[2] ? rows.sum(0) : Tensor()};
}

// ---- all others

const Names WAITS = {  // the size of the result, or a test of the arguments, has to be known to the host
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::histc", "aten::equal", "aten::repeat_interleave.Tensor", "aten::_linalg_svd.U", "aten::_linalg_svd",
    "aten::linalg_lstsq.out", "aten::linalg_eigvals.out", "aten::_linalg_eigvals", "aten::_linalg_eigh"};

template <class Function>
c10::IValue for_each_tensor(const c10::IValue& value, Function f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> result;
    for (const Tensor& t : value.toTensorVector()) result.push_back(f(t));
    return result;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> result;
    for (std::optional<Tensor> t : value.toOptionalTensorList())
      result.push_back(t && t->defined() ? std::optional<Tensor>(f(*t)) : std::nullopt);
    return result;
  }
  return value;
}

bool starts_with(const std::string& name, const char* prefix) { return name.rfind(prefix, 0) == 0; }

// What the real device refuses, and waits for.
void check_arguments(const std::string& name, const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> values) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !missing.count(name), "The operator '", name, "' is not currently implemented for the ", kind, " device");
  bool scalars = takes_host_scalars.count(name), waits = WAITS.count(name);
  bool putting = starts_with(name, "aten::_index_put"), indexing = putting || starts_with(name, "aten::index");
  int host_scalars = 0;
  for (size_t i = 0; i < values.size(); i++) {
    bool index = indexing && values[i].isOptionalTensorList();
    for_each_tensor(values[i], [&](const Tensor& t) {
      if (!t.defined()) return t;
      if (index && putting) waits |= t.is_cpu() || t.scalar_type() == at::kBool || t.scalar_type() == at::kByte;
      if (on_device(t) || t.device().is_meta() || (index && t.is_cpu())) return t;
      bool allowed = scalars && t.is_cpu() && t.dim() == 0;
      if (starts_with(name, "aten::addcmul") || starts_with(name, "aten::addcdiv")) allowed &= i == 2;
      TORCH_CHECK(
          allowed, "Expected all tensors to be on the same device, but found at least two devices, ", simulated(), " and ", t.device(),
          "! (", name, ", argument ", schema.arguments()[i].name(), ")");
      TORCH_CHECK(
          starts_with(name, "aten::where") || ++host_scalars == 1, "Trying to pass too many CPU scalars to non-CPU kernel! (", name, ")");
      return t;
    });
  }
  // a single draw, or draws without replacement, test the probabilities first
  if (name == "aten::multinomial") waits = values[1].toInt() == 1 || !values[2].toBool();
  if (waits) wait("look at values", name);
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const std::string name = c10::toString(op.operator_name());
  auto values = torch::jit::pop(*stack, arguments.size());
  check_arguments(name, schema, values);

  std::vector<std::pair<Tensor, Tensor>> written;
  for (size_t i = 0; i < values.size(); i++) {
    const auto* alias = arguments[i].alias_info();
    bool writes = alias && alias->isWrite();
    auto borrowed = for_each_tensor(values[i], [&](const Tensor& t) {
      Tensor host = on_host(t);
      if (writes && on_device(t)) written.emplace_back(t, host);
      return host;
    });
    if (values[i].isDevice()) borrowed = c10::Device(c10::kCPU);
    bool random = arguments[i].type()->str().find("Generator") != std::string::npos;
    if (random) borrowed = of_host(values[i].toOptional<at::Generator>());
    stack->push_back(std::move(borrowed));
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [t, host] : written) settle(t, host);

  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (size_t i = 0; i < results.size(); i++) {
    const auto* alias = schema.returns()[i].alias_info();
    TORCH_CHECK(!alias || alias->isWrite(), "the pretended device has no view ", name, ": add it to accelerator.cpp");
    auto same = std::find_if(arguments.begin(), arguments.end(), [&](const auto& argument) {
      return alias && argument.alias_info() && *argument.alias_info() == *alias;
    });
    if (same != arguments.end()) {
      stack->push_back(values[same - arguments.begin()]);
    } else {
      if (!results[i].isTensor() && !results[i].isTensorList()) wait("copy to the host", name);
      stack->push_back(for_each_tensor(results[i], to_device));
    }
  }
}

Names lines(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

}  // namespace

extern "C" {

// From now on torch has a device of this type; `forced`, `missing` and `takes_host_scalars` are names of operators.
void start(const char* type, const char* forced, const char* missing_, const char* takes_host_scalars_) {
  bool cuda = std::string(type) == "cuda";
  kind = cuda ? c10::kCUDA : c10::kMPS;
  key = cuda ? c10::DispatchKey::CUDA : c10::DispatchKey::MPS;
  missing = lines(missing_);
  takes_host_scalars = lines(takes_host_scalars_);

  c10::SetAllocator(kind, &device_memory);
  static Guard guard;
  static c10::impl::DeviceGuardImplRegistrar registrar(kind, &guard);
  if (cuda) {
    at::CUDAHooksRegistry()->Register("CUDAHooks", [](at::CUDAHooksArgs) { return std::make_unique<CUDAHooks>(); });
  } else {
    at::MPSHooksRegistry()->Register("MPSHooks", [] { return std::make_unique<MPSHooks>(); });
  }

  static torch::Library all(torch::Library::IMPL, "_", key, __FILE__, __LINE__);
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  static torch::Library aten(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  aten.impl("empty.memory_format", &empty);
  aten.impl("empty_strided", &empty_strided);
  aten.impl("copy_", &copy);
  aten.impl("_copy_from", &copy_from);
  aten.impl("_local_scalar_dense", &item);
  aten.impl("resize_", &resize);
  aten.impl("set_.source_Storage", &set_whole_storage);
  aten.impl("set_.source_Storage_storage_offset", &set_storage);
  aten.impl("set_.source_Tensor", &set_tensor);
  aten.impl("as_strided", &as_strided);
  aten.impl("view", [](const Tensor& t, at::IntArrayRef size) { return at::native::view(t, size); });
  aten.impl("_reshape_alias", [](const Tensor& t, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::_reshape_alias(t, size, stride);
  });
  aten.impl("unfold", [](const Tensor& t, int64_t dimension, int64_t size, int64_t step) {
    return at::native::unfold(t, dimension, size, step);
  });
  aten.impl("view_as_real", &view_as_real);
  aten.impl("native_dropout", &dropout);
  if (cuda) {
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  } else {  // torch for the CPU cannot choose for this device
    static torch::Library autograd(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradMPS, __FILE__, __LINE__);
    autograd.impl("scaled_dot_product_attention", &mps_attention);
    aten.impl("scaled_dot_product_attention", &mps_attention);
    aten.impl("linear_backward", &mps_linear_backward);
  }
  for (const auto& name : lines(forced)) aten.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

void on_wait(void (*f)(const char*, const char*)) { waited = f; }
void share_default_generator() { share_default = true; }
}

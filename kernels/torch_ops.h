// What torch_ops.cpp's operators share. They are group_norm.cpp's and cpu.cpp's loops as operators of torch's own kind: their
// arguments, their memory and their gradients without Python on the way. Built against torch's headers, behind loops.h.
#include <ATen/Parallel.h>
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>

namespace {

using at::Tensor;
using Given = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Loops {
  decltype(&fd_group_norm) norm;
  decltype(&fd_group_norm_backward) norm_backward;
  decltype(&fd_blocks) blocks;
  decltype(&fd_denoising_loss) loss;
} loops;

Tensor or_none(const Given& tensor) { return tensor.value_or(Tensor()); }

// What torch dispatches on is an ordinary CPU tensor's: no subclass, view of complex numbers, tracer's or transform's tensor.
bool is_ordinary(const Tensor& tensor) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet in_inference_mode({DispatchKey::CPU, DispatchKey::AutocastCPU});
  static const auto usual = in_inference_mode | c10::DispatchKeySet({DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU});
  return tensor.key_set() == usual || tensor.key_set() == in_inference_mode;
}

// Whether somebody has chosen a backend. Here, as Python takes ten times as long to look.
bool is_chosen() {
  const char* backend = std::getenv("FASTDIFF_BACKEND");
  return backend && *backend;
}

Tensor room(at::IntArrayRef shape, at::ScalarType type = at::kFloat) {
  return at::empty(shape, at::TensorOptions().dtype(type).device(at::kCPU));
}

// Tensor::to takes a fifth of a microsecond to find that there is nothing to do.
Tensor as_type(const Tensor& tensor, at::ScalarType type) { return tensor.scalar_type() == type ? tensor : tensor.to(type); }
Tensor in_float32(const Tensor& tensor) { return as_type(tensor, at::kFloat); }

template <class Number = float> Number* address(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<Number>() : nullptr;
}

// Gradients that raise where they are differentiated again, in place of being taken for constants.
variable_list only_once(variable_list found, const char* message) {
  const at::AutoGradMode grad(true);
  for (auto& each : found)
    if (each.defined()) each = each.detach().requires_grad_();
  return (*std::make_shared<torch::autograd::DelayedError>(message, found.size()))(std::move(found));
}

}  // namespace

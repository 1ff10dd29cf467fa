// group_norm_silu of torch_ops.cpp; the formulas stand in group_norm.py and group_norm_backward.py.

namespace {

struct Arguments {
  Tensor x, residual, weight, bias, scale, shift;  // undefined where there is none
  int64_t groups;
  double eps;
  bool activation;

  std::array<const Tensor*, 6> tensors() const { return {&x, &residual, &weight, &bias, &scale, &shift}; }
};

Arguments arguments_of(const Tensor& x, const Given& residual, const Given& weight, const Given& bias, const Given& scale,
                       const Given& shift, int64_t groups, double eps, bool activation) {
  return {x, or_none(residual), or_none(weight), or_none(bias), or_none(scale), or_none(shift), groups, eps, activation};
}

bool is_float(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// Whether the channels lie last in memory.
bool lies_last(const Tensor& x) {
  int64_t expected = 1;
  const auto next = [&](int64_t dim) {
    const bool fits = x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
    return fits;
  };
  bool fits = next(1);
  for (int64_t dim = x.dim() - 1; dim > 1; dim--) fits = next(dim) && fits;
  return next(0) && fits;
}

// Whether the loops can read these operands as they lie. What they cannot, and what is wrong, takes the long way.
bool is_direct(const Arguments& a) {
  if (is_chosen()) return false;
  for (const Tensor* tensor : a.tensors())
    if (tensor->defined() && !(is_ordinary(*tensor) && is_float(*tensor))) return false;
  const auto& x = a.x;
  if (x.dim() < 2 || x.dim() > 5 || x.numel() == 0 || !(x.is_contiguous() || lies_last(x))) return false;
  const int64_t batch = x.size(0), channels = x.size(1);
  if (a.groups < 1 || channels % a.groups || !(a.eps > 0 && std::isfinite(a.eps))) return false;
  const auto& r = a.residual;
  if (r.defined() && (r.sizes() != x.sizes() || r.strides() != x.strides() || r.scalar_type() != x.scalar_type())) return false;
  for (const Tensor* vector : {&a.weight, &a.bias})
    if (vector->defined() && (vector->dim() != 1 || vector->size(0) != channels)) return false;
  for (const Tensor* each : {&a.scale, &a.shift})
    if (each->defined() && (each->dim() != 2 || each->size(1) != channels || (each->size(0) != batch && each->size(0) != 1)))
      return false;
  return true;
}

// What the loops do not read, float16, in float32.
Tensor readable(const Tensor& tensor) {
  return tensor.defined() && tensor.scalar_type() != at::kBFloat16 ? in_float32(tensor) : tensor;
}

// The same with its numbers side by side.
Tensor readable_vector(const Tensor& vector) {
  const Tensor found = readable(vector);
  return !found.defined() || found.size(-1) == 1 || found.stride(-1) == 1 ? found : found.contiguous();
}

// Elements of either type.
void* elements(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// x + residual, the parameters, and a call of a loop on them, which they must outlive.
struct Call {
  Tensor v, weight, bias, scale, shift;
  Norm norm{};

  // `other`: the type of y or its gradient, which the loops have in x's
  Call(const Arguments& a, at::ScalarType other)
      : v(a.residual.defined() ? in_float32(a.x).add(a.residual) : a.x.scalar_type() == other ? readable(a.x) : in_float32(a.x)),
        weight(readable_vector(a.weight)),
        bias(readable_vector(a.bias)),
        scale(readable_vector(a.scale)),
        shift(readable_vector(a.shift)) {
    if (!(v.is_contiguous() || lies_last(v))) v = v.contiguous();  // as a hook on saved tensors may leave it
    const auto vector = [](const Tensor& each) -> Vector {
      if (!each.defined()) return {};
      return {elements(each), each.dim() == 2 && each.size(0) > 1 ? each.stride(0) : 0, each.scalar_type() == at::kBFloat16};
    };
    norm.x = elements(v), norm.weight = vector(weight), norm.bias = vector(bias);
    norm.scale = vector(scale), norm.shift = vector(shift);
    norm.batch = v.size(0), norm.channels = v.size(1), norm.n = v.numel() / (norm.batch * norm.channels);
    norm.groups = a.groups, norm.eps = a.eps, norm.activation = a.activation;
    norm.last = !v.is_contiguous(), norm.threads = at::get_num_threads(), norm.bfloat16 = v.scalar_type() == at::kBFloat16;
  }
};

Tensor forward(const Arguments& a, const Tensor& mean, const Tensor& rstd) {
  Call call(a, a.x.scalar_type());
  const Tensor y = at::empty_like(call.v);
  call.norm.y = elements(y), call.norm.mean = address(mean), call.norm.rstd = address(rstd);
  loops.norm(&call.norm);
  return as_type(y, a.x.scalar_type());
}

// dv, and [2, B, C]: the sums over positions of dh and of dh times the normalised v.
std::pair<Tensor, Tensor> backward(const Arguments& a, const Tensor& mean, const Tensor& rstd, const Tensor& given) {
  Call call(a, given.scalar_type());
  Tensor grad = as_type(given, call.v.scalar_type());
  if (grad.strides() != call.v.strides()) grad = at::empty_like(call.v).copy_(grad);
  const Tensor grad_x = at::empty_like(call.v), sums = room({2, call.norm.batch, call.norm.channels});
  call.norm.mean = address(mean), call.norm.rstd = address(rstd), call.norm.grad = elements(grad);
  call.norm.grad_x = elements(grad_x), call.norm.sums = address(sums);
  loops.norm_backward(&call.norm);
  return {as_type(grad_x, a.x.scalar_type()), sums};
}

// The gradients of x, residual, weight, bias, scale and shift from what the loop leaves, as _norm.py has them.
variable_list gradients(const Arguments& a, const Tensor& grad_x, const Tensor& sums, const std::array<bool, 6>& wanted) {
  variable_list found(6);
  const auto& [x, residual, weight, bias, scale, shift, groups, eps, activation] = a;
  found[0] = grad_x;
  if (wanted[1]) found[1] = wanted[0] ? grad_x.clone() : grad_x;
  if (wanted[2] || wanted[3]) {
    const Tensor each = scale.defined() ? sums.mul(scale) : sums;
    Tensor over_batch = each.size(1) == 1 ? each.select(1, 0) : each.sum(1);
    if (weight.defined() && bias.defined() && weight.scalar_type() == bias.scalar_type())
      over_batch = as_type(over_batch, weight.scalar_type());  // both at once
    if (wanted[2]) found[2] = as_type(over_batch.select(0, 1), weight.scalar_type());
    if (wanted[3]) found[3] = as_type(over_batch.select(0, 0), bias.scalar_type());
  }
  if (wanted[4]) {
    Tensor by_scale = sums.select(0, 1);
    if (weight.defined()) by_scale = by_scale.mul(weight);
    if (bias.defined()) by_scale = by_scale.add(sums.select(0, 0).mul(bias));
    found[4] = as_type(by_scale.sum_to_size(scale.sizes()), scale.scalar_type());
  }
  if (wanted[5]) {
    const Tensor over_batch = as_type(sums.select(0, 0).sum_to_size(shift.sizes()), shift.scalar_type());
    const bool is_of_bias = wanted[3] && found[3].is_alias_of(over_batch);  // who adds to one would add to both
    found[5] = is_of_bias ? over_batch.clone() : over_batch;
  }
  return found;
}

// The same operator as Python registers it, for a gradient that is no ordinary tensor, such as vmap's.
std::pair<Tensor, Tensor> backward_by_operator(const Arguments& a, const Tensor& mean, const Tensor& rstd, const Tensor& grad) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Given&,
                                               const Given&, const Given&, const Given&, const Given&, int64_t, double, bool);
  static const auto backward_op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastdiff::group_norm_silu_backward", "").typed<Signature>();
  const auto given = [](const Tensor& tensor) { return tensor.defined() ? Given(tensor) : Given(); };
  const auto [grad_x, sums] = backward_op.call(grad, mean, rstd, a.x, given(a.residual), given(a.weight), given(a.bias),
                                               given(a.scale), given(a.shift), a.groups, a.eps, a.activation);
  return {grad_x, sums};
}

struct Differentiable : torch::autograd::Function<Differentiable> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Given& residual, const Given& weight, const Given& bias,
                        const Given& scale, const Given& shift, int64_t groups, double eps, bool activation) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto a = arguments_of(x, residual, weight, bias, scale, shift, groups, eps, activation);
    const Tensor mean = room({x.size(0), groups}), rstd = room({x.size(0), groups});
    // what the operator saves for its own gradient: checkpointing may meet one the first time and the other the second
    context->save_for_backward({mean, rstd, x, a.residual, a.weight, a.bias, a.scale, a.shift});
    context->saved_data["groups"] = groups;
    context->saved_data["eps"] = eps;
    context->saved_data["activation"] = activation;
    return ::forward(a, mean, rstd);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const bool is_differentiated_again = at::GradMode::is_enabled();
    const at::AutoGradMode no_grad(false);
    const auto saved = context->get_saved_variables();
    const Tensor mean = saved[0].contiguous(), rstd = saved[1].contiguous();
    const Arguments a{saved[2], saved[3], saved[4], saved[5], saved[6], saved[7], context->saved_data["groups"].toInt(),
                      context->saved_data["eps"].toDouble(), context->saved_data["activation"].toBool()};
    const auto run = is_ordinary(grads[0]) ? ::backward : backward_by_operator;
    const auto [grad_x, sums] = run(a, mean, rstd, grads[0]);
    std::array<bool, 6> wanted{};
    size_t edge = 0;
    for (size_t i = 0; i < wanted.size(); i++)
      if (a.tensors()[i]->defined()) wanted[i] = context->needs_input_grad(edge++);
    variable_list found = gradients(a, grad_x, sums, wanted);
    if (is_differentiated_again)
      found = only_once(std::move(found), "group_norm_silu has no second derivative; use torch's group_norm and silu for it");
    found.resize(9);
    return found;
  }
};

// An undefined tensor, Python's None, where the operands need the long way; without a gradient below autograd.
template <bool differentiable>
Tensor group_norm_silu(const Tensor& x, const Given& residual, const Given& weight, const Given& bias, const Given& scale,
                       const Given& shift, int64_t groups, double eps, bool activation) {
  const auto a = arguments_of(x, residual, weight, bias, scale, shift, groups, eps, activation);
  if (!is_direct(a)) return Tensor();
  if (differentiable && at::GradMode::is_enabled())
    for (const Tensor* tensor : a.tensors())
      if (tensor->defined() && tensor->requires_grad())
        return Differentiable::apply(x, residual, weight, bias, scale, shift, groups, eps, activation);
  const at::AutoDispatchBelowADInplaceOrView below;
  return forward(a, Tensor(), Tensor());
}

}  // namespace

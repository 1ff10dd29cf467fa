// denoising_loss of torch_ops.cpp, for the common case: float32, no variance behind the prediction, no mask. The formulas stand in
// denoising_loss.py.

namespace {

struct LossArguments {
  Tensor out, x0, alpha_sigma, t, seed, sample_id, draw, weight, noise;
  int64_t kind;
};

// Whether the loop can read these operands, whose shapes and dtypes are checked in Python, as they lie.
bool is_direct(const LossArguments& a) {
  if (is_chosen() || a.out.sizes() != a.x0.sizes() || a.out.numel() == 0 || a.alpha_sigma.size(0) == 0) return false;
  for (const Tensor* number : {&a.out, &a.x0, &a.alpha_sigma, &a.weight, &a.noise})
    if (number->defined() && !(is_ordinary(*number) && number->scalar_type() == at::kFloat && number->is_contiguous())) return false;
  for (const Tensor* index : {&a.t, &a.seed, &a.sample_id, &a.draw})
    if (!is_ordinary(*index) || !index->is_contiguous()) return false;
  return true;
}

// [B], and out - target into `error` where that is defined.
Tensor loss_of(const LossArguments& a, const Tensor& error) {
  const int64_t batch = a.out.size(0), n = a.out.numel() / batch;
  const Tensor sums = room({batch, loops.blocks(n)}, at::kDouble);
  const auto index = [](const Tensor& tensor) { return address<int64_t>(tensor); };
  loops.loss(address<double>(sums), address(error), address(a.out), address(a.x0), address(a.noise), address(a.alpha_sigma),
             index(a.t), index(a.seed), index(a.sample_id), index(a.draw), nullptr, nullptr, batch, n, n, a.alpha_sigma.size(0), 0, 1,
             1, 0, (int)a.kind, at::get_num_threads());
  const Tensor mean = sums.sum(1).div(n);
  return in_float32(a.weight.defined() ? mean.mul(a.weight) : mean);
}

// The error times each sample's factor, in its own memory where nobody else has it: the graph is not kept for another pass.
Tensor times_each(const Tensor& error, const Tensor& factor, bool is_shared) {
  std::vector<int64_t> shape(error.dim(), 1);
  shape[0] = error.size(0);
  const bool is_needed_again = is_shared || torch::autograd::get_current_graph_task_keep_graph();
  return is_needed_again || !is_ordinary(factor) ? error.mul(factor.reshape(shape)) : error.mul_(factor.view(shape));
}

struct DifferentiableLoss : torch::autograd::Function<DifferentiableLoss> {
  static Tensor forward(AutogradContext* context, const Tensor& out, const Tensor& x0, const Tensor& alpha_sigma, const Tensor& t,
                        const Tensor& seed, const Tensor& sample_id, const Tensor& draw, int64_t kind, const Given& weight,
                        const Given& noise) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor error = at::empty_like(out);
    context->set_materialize_grads(false);
    context->save_for_backward({or_none(weight), error});  // what the operator saves: see norm_op.cpp
    context->saved_data["is_shared"] = at::SavedTensorDefaultHooks::get_hooks().has_value();  // a hook may keep what it is given
    return loss_of({out, x0, alpha_sigma, t, seed, sample_id, draw, or_none(weight), or_none(noise), kind}, error);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list found(10);
    if (!grads[0].defined()) return found;
    const bool is_differentiated_again = at::GradMode::is_enabled();
    const at::AutoGradMode no_grad(false);
    const auto saved = context->get_saved_variables();
    const Tensor &weight = saved[0], &error = saved[1];
    const double each = 2.0 / (double)(error.numel() / error.size(0));
    const Tensor factor = weight.defined() ? weight.mul(each).mul(grads[0]) : grads[0].mul(each);
    found[0] = times_each(error, factor, context->saved_data["is_shared"].toBool());
    if (is_differentiated_again)
      found[0] = only_once({found[0]}, "denoising_loss has no second derivative; use q_sample's target and torch's operators for it")[0];
    return found;
  }
};

// An undefined tensor, Python's None, where the operands need the long way; without a gradient below autograd.
template <bool differentiable>
Tensor denoising_loss(const Tensor& out, const Tensor& x0, const Tensor& alpha_sigma, const Tensor& t, const Tensor& seed,
                      const Tensor& sample_id, const Tensor& draw, int64_t kind, const Given& weight, const Given& noise) {
  const LossArguments a{out, x0, alpha_sigma, t, seed, sample_id, draw, or_none(weight), or_none(noise), kind};
  if (!is_direct(a)) return Tensor();
  if (differentiable && at::GradMode::is_enabled() && out.requires_grad())
    return DifferentiableLoss::apply(out, x0, alpha_sigma, t, seed, sample_id, draw, kind, weight, noise);
  const at::AutoDispatchBelowADInplaceOrView below;
  return loss_of(a, Tensor());
}

}  // namespace

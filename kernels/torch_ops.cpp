// Registers the operators of norm_op.cpp and loss_op.cpp, which stand before this in one translation unit.

namespace {

// The long way, for a subclass made in inference mode, which has Python's key alone.
template <class Operator> struct Elsewhere;
template <class... Arguments> struct Elsewhere<Tensor (*)(Arguments...)> {
  static Tensor run(Arguments...) { return Tensor(); }
};

// `direct` runs below autograd, `with_gradient` above.
template <class Operator>
void add(torch::Library& library, const char* name, const char* arguments, Operator* direct, Operator* with_gradient) {
  library.def((std::string(name) + arguments + " -> Tensor").c_str());
  library.impl(name, torch::dispatch(c10::DispatchKey::CPU, direct));
  library.impl(name, torch::dispatch(c10::DispatchKey::AutogradCPU, with_gradient));
  library.impl(name, torch::dispatch(c10::DispatchKey::Python, &Elsewhere<Operator*>::run));
}

}  // namespace

// Once in a process, with the addresses of the loops; a message where torch refuses them.
extern "C" const char* fd_register(decltype(loops.norm) norm, decltype(loops.norm_backward) norm_backward, decltype(loops.blocks) blocks,
                                   decltype(loops.loss) loss) {
  static std::string refusal;
  static std::unique_ptr<torch::Library> library;
  if (library) return nullptr;
  try {
    loops = {norm, norm_backward, blocks, loss};
    library = std::make_unique<torch::Library>(torch::Library::FRAGMENT, "fastdiff", std::nullopt, __FILE__, __LINE__);
    add(*library, "group_norm_silu_direct",
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, "
        "bool activation)",
        group_norm_silu<false>, group_norm_silu<true>);
    add(*library, "denoising_loss_direct",
        "(Tensor out, Tensor x0, Tensor alpha_sigma, Tensor t, Tensor seed, Tensor sample_id, Tensor draw, int kind, "
        "Tensor? weight, Tensor? noise)",
        denoising_loss<false>, denoising_loss<true>);
  } catch (const std::exception& error) {
    library.reset();
    refusal = error.what();
    return refusal.c_str();
  }
  return nullptr;
}

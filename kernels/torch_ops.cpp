// Registers the operators of norm_op.cpp and loss_op.cpp, which stand before this in one translation unit.

namespace {

template <class Operator> void add(torch::Library& library, const char* name, const char* arguments, Operator run) {
  library.def((std::string(name) + arguments + " -> Tensor").c_str());
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU}) library.impl(name, torch::dispatch(key, run));
}

}  // namespace

// Once in a process, with the addresses of the loops; a message where torch refuses them.
extern "C" const char* fd_register(decltype(loops.norm) norm, decltype(loops.norm_backward) norm_backward, decltype(loops.blocks) blocks,
                                   decltype(loops.loss) loss) {
  static std::string refusal;
  static std::unique_ptr<torch::Library> library;
  try {
    loops = {norm, norm_backward, blocks, loss};
    library = std::make_unique<torch::Library>(torch::Library::FRAGMENT, "fastdiff", std::nullopt, __FILE__, __LINE__);
    add(*library, "group_norm_silu_direct",
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, "
        "bool activation)",
        TORCH_FN(group_norm_silu));
    add(*library, "denoising_loss_direct",
        "(Tensor out, Tensor x0, Tensor alpha_sigma, Tensor t, Tensor seed, Tensor sample_id, Tensor draw, int kind, "
        "Tensor? weight, Tensor? noise)",
        TORCH_FN(denoising_loss));
  } catch (const std::exception& error) {
    refusal = error.what();
    return refusal.c_str();
  }
  return nullptr;
}

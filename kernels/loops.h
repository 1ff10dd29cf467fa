// The CPU's loops that torch_ops.cpp calls by their addresses, as both of its sides see them.
#include <cstdint>

// [channels], or [batch, channels] with samples `step` (0: shared) apart, of float or where `bfloat16` of that; null for none.
struct Vector {
  const void* at;
  int64_t step, bfloat16;
};

// What a call of group_norm.cpp's loops is given. x, y, grad, grad_x: [batch, channels, n], or [batch, n, channels] where last, of
// float or where `bfloat16` of that; mean, rstd: [batch, groups], or null where nobody wants them; sums: [2, batch, channels].
// Python packs the same (_group_norm_cpu.py).
struct Norm {
  void* y;
  float *mean, *rstd;
  const void* x;
  Vector weight, bias, scale, shift;
  const void* grad;
  void* grad_x;
  float* sums;
  int64_t batch, channels, n, groups;
  double eps;
  int activation, last, threads, bfloat16;
};

extern "C" {

void fd_group_norm(const Norm* f);
void fd_group_norm_backward(const Norm* f);

// blocks of a sample of n elements: the sums that fd_denoising_loss leaves for each
int fd_blocks(int64_t n);

// sums, totals: [batch, fd_blocks(n)]; out: [batch, lane] with lane = n or 2n; errors, noise, mask or null; a mask is float32 if
// `wide`, else of bytes, its rows `stride` apart
void fd_denoising_loss(double* sums, float* errors, const float* out, const float* x0, const float* noise, const float* alpha_sigma,
                       const int64_t* t, const int64_t* seed, const int64_t* sample_id, const int64_t* draw, const void* mask,
                       double* totals, int64_t batch, int64_t n, int64_t lane, int64_t levels, int64_t stride, int64_t period,
                       int64_t inner, int wide, int kind, int threads);

}  // extern "C"

// What a call of group_norm.cpp's loops is given. x, y, grad, grad_x: [batch, channels, n], or [batch, n, channels] where last;
// mean, rstd: [batch, groups], or null where nobody wants them; weight, bias: [channels]; scale, shift: [channels] of each sample,
// `step` (0: shared) apart; sums: [2, batch, channels]. Python packs the same (_group_norm_cpu.py).
#include <cstdint>

namespace {

struct Norm {
  float *y, *mean, *rstd;
  const float *x, *weight, *bias, *scale, *shift, *grad;
  float *grad_x, *sums;
  int64_t scale_step, shift_step, batch, channels, n, groups;
  double eps;
  int activation, last, threads;
};

}  // namespace

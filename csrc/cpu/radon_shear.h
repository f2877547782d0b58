static void shear_forward(const RadonPlan& plan, const float* x, float* y, int64_t slices, RunRanges run) {
  (void)plan, (void)x, (void)y, (void)slices, (void)run;
}
static void shear_adjoint(const RadonPlan& plan, const float* y, float* x, int64_t slices, RunRanges run) {
  (void)plan, (void)x, (void)y, (void)slices, (void)run;
}

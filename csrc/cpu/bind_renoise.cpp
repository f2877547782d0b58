#include <optional>

#include "bind.h"
#include "cpu/renoise.h"

namespace recon3d {
namespace {

using OptionalTensor = std::optional<Tensor>;

PhiloxKey key_of(int64_t seed, int64_t level, int64_t stream) {
  const uint64_t s = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(level),
          static_cast<uint32_t>(stream)};
}

Tensor philox_bits(const Tensor& slices, int64_t pixels, int64_t seed, int64_t level, int64_t stream) {
  STD_TORCH_CHECK(slices.scalar_type() == ScalarType::Long && pixels >= 0, "philox_bits: int64 slice indices expected");
  const Tensor index = torch::stable::contiguous(slices);
  const int64_t n = index.numel();
  Tensor bits = torch::stable::new_empty(index, {n, pixels});
  const PhiloxKey key = key_of(seed, level, stream);
  torch::stable::parallel_for(0, philox_tasks(n, pixels), 1, [&](int64_t t0, int64_t t1) {
    philox_bits_cpu(longs(index), out<int64_t>(bits), n, pixels, key, t0, t1);
  });
  return bits;
}

void check_noise(const Tensor& anchors, const Tensor& coefficients, int64_t slices) {
  STD_TORCH_CHECK(anchors.scalar_type() == ScalarType::Long && coefficients.scalar_type() == ScalarType::Float &&
                      anchors.numel() == 2 * slices && coefficients.numel() == 2 * slices && anchors.is_contiguous() &&
                      coefficients.is_contiguous(),
                  "renoise: anchors and coefficients must be contiguous [slices, 2], int64 and float32");
}

Tensor philox_normal(const Tensor& anchors, const Tensor& coefficients, int64_t pixels, int64_t seed, int64_t level,
                     int64_t stream, bool wide) {
  const int64_t slices = anchors.dim() ? anchors.size(0) : 0;
  check_noise(anchors, coefficients, slices);
  Tensor z = torch::stable::new_empty(coefficients, {slices, pixels}, wide ? ScalarType::Double : ScalarType::Float);
  const StackNoise noise{longs(anchors), floats(coefficients), key_of(seed, level, stream)};
  RECON3D_REAL(z, "philox_normal", {
    torch::stable::parallel_for(0, philox_tasks(slices, pixels), 1, [&](int64_t t0, int64_t t1) {
      philox_normal_cpu(noise, out<scalar_t>(z), slices, pixels, t0, t1);
    });
  })
  return z;
}

void step_into(Tensor& result, const Tensor& u, const Tensor& x0, const OptionalTensor& x0c, const OptionalTensor& y,
               const OptionalTensor& mask, int64_t factor, const Tensor& anchors, const Tensor& coefficients,
               int64_t seed, int64_t level, int64_t stream, double k_null, double z_null, double k_measured,
               double z_measured, double lam, bool corrected) {
  const int64_t dim = u.dim();
  STD_TORCH_CHECK(dim >= 3 && factor >= 1, "renoise: u must be [z, y, x] or [z, c, y, x]");
  const int64_t slices = u.size(0), columns = u.size(dim - 1);
  int64_t rows = 1;  // channels are stacked: blocks never straddle them, as factor divides the rows of each
  for (int64_t d = 1; d < dim - 1; ++d) rows *= u.size(d);
  STD_TORCH_CHECK(u.size(dim - 2) % factor == 0 && columns % factor == 0, "renoise: factor must divide y and x");
  const auto like = [&](const Tensor& t, int64_t numel) {
    return t.numel() == numel && t.scalar_type() == u.scalar_type() && t.is_contiguous();
  };
  STD_TORCH_CHECK(u.is_contiguous() && like(x0, u.numel()) && x0c.has_value() != y.has_value() &&
                      (!x0c || like(*x0c, u.numel())) && (!y || like(*y, u.numel() / (factor * factor))) &&
                      (!mask || ((mask->numel() == rows * columns || mask->numel() == u.numel()) &&
                                 mask->scalar_type() == ScalarType::Bool && mask->is_contiguous())),
                  "renoise: x0, x0c, y and mask must be contiguous and go with u");
  check_noise(anchors, coefficients, slices);
  const DataKind kind = x0c          ? DataKind::given
                        : mask       ? DataKind::mask
                        : factor > 1 ? DataKind::block_mean
                                     : DataKind::identity;
  RECON3D_REAL(u, "renoise", {
    const RenoiseStep<scalar_t> step{kind,
                                     in<scalar_t>(u),
                                     in<scalar_t>(x0),
                                     x0c ? in<scalar_t>(*x0c) : nullptr,
                                     y ? in<scalar_t>(*y) : nullptr,
                                     mask ? in<uint8_t>(*mask) : nullptr,
                                     mask && mask->numel() == u.numel() ? rows * columns : 0,
                                     out<scalar_t>(result),
                                     slices,
                                     rows,
                                     columns,
                                     factor,
                                     {longs(anchors), floats(coefficients), key_of(seed, level, stream)},
                                     k_null,
                                     z_null,
                                     k_measured,
                                     z_measured,
                                     lam,
                                     corrected};
    torch::stable::parallel_for(0, renoise_tasks(step), 1, [&](int64_t t0, int64_t t1) { renoise_cpu(step, t0, t1); });
  })
}

Tensor renoise(const Tensor& u, const Tensor& x0, const OptionalTensor& x0c, const OptionalTensor& y,
               const OptionalTensor& mask, int64_t factor, const Tensor& anchors, const Tensor& coefficients,
               int64_t seed, int64_t level, int64_t stream, double k_null, double z_null, double k_measured,
               double z_measured, double lam, bool corrected) {
  Tensor result = torch::stable::empty_like(u);
  step_into(result, u, x0, x0c, y, mask, factor, anchors, coefficients, seed, level, stream, k_null, z_null, k_measured,
            z_measured, lam, corrected);
  return result;
}

void renoise_(Tensor u, const Tensor& x0, const OptionalTensor& x0c, const OptionalTensor& y,
              const OptionalTensor& mask, int64_t factor, const Tensor& anchors, const Tensor& coefficients,
              int64_t seed, int64_t level, int64_t stream, double k_null, double z_null, double k_measured,
              double z_measured, double lam, bool corrected) {
  step_into(u, u, x0, x0c, y, mask, factor, anchors, coefficients, seed, level, stream, k_null, z_null, k_measured,
            z_measured, lam, corrected);
}

}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("philox_bits", TORCH_BOX(&recon3d::philox_bits));
  m.impl("philox_normal", TORCH_BOX(&recon3d::philox_normal));
  m.impl("renoise", TORCH_BOX(&recon3d::renoise));
  m.impl("renoise_", TORCH_BOX(&recon3d::renoise_));
}

// The part of tde_kernels._C that runs on a GPU: functions on the current device and a given stream.
#include "bindings.h"
#include "tde/background_exempt.h"
#include "tde/cross_entropy.h"
#include "tde/ema.h"
#include "tde/logits.h"
#include "tde/probe.h"
#include "tde/rows.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

void update_ema(const tde::Matrix& x, const tde::EmaUpdate& update, Address floats, Address counters, Address stream) {
  raise_unless_ok(tde::cuda::update_ema(x, update, at<float>(floats), at<unsigned>(counters), at<void>(stream)));
}

void fold_ema(Address ema, Address num_updates, Address sum, int64_t dim, float momentum, Address stream) {
  raise_unless_ok(tde::cuda::fold_ema(at<float>(ema), at<int64_t>(num_updates), at<const float>(sum), dim, momentum,
                                      at<void>(stream)));
}

void normalize_rows(const tde::Matrix& a, const tde::RowTransform& transform, const tde::Matrix& out, Address norms,
                    Address projections, Address stream) {
  raise_unless_ok(
      tde::cuda::normalize_rows(a, transform, out, at<float>(norms), at<float>(projections), at<void>(stream)));
}

void normalize_rows_backward(const tde::Matrix& grad, const tde::Matrix& a, Address norms,
                             const tde::RowTransform& transform, const tde::Matrix& grad_a, Address grad_divisor,
                             Address stream) {
  raise_unless_ok(tde::cuda::normalize_rows_backward(grad, a, at<const float>(norms), transform, grad_a,
                                                     at<float>(grad_divisor), at<void>(stream)));
}

void background_exempt(const tde::Matrix& logits, Address row_projections, Address class_projections, int64_t heads,
                       Address alpha, int64_t background, bool log, const tde::Matrix& out, Address stream) {
  raise_unless_ok(tde::cuda::background_exempt(logits, at<const float>(row_projections),
                                               at<const float>(class_projections), heads, at<const float>(alpha),
                                               background, log, out, at<void>(stream)));
}

void cross_entropy(const tde::Matrix& logits, const tde::CrossEntropy& loss, const tde::LossPass& pass,
                   Address stream) {
  raise_unless_ok(tde::cuda::cross_entropy(logits, loss, pass, at<void>(stream)));
}

void small_logits(const tde::Operand& features, const tde::Operand& weights, const tde::EmaUpdate& update,
                  const tde::Matrix& out, Address floats, Address counters, Address stream) {
  raise_unless_ok(tde::cuda::small_logits(features, weights, update, out, at<float>(floats), at<unsigned>(counters),
                                          at<void>(stream)));
}

void small_logits_backward(const tde::Operand& own, const tde::Operand& other, const tde::Matrix& grad,
                           int64_t grad_col_stride, const tde::Matrix& grad_own, Address grad_divisor, Address floats,
                           Address counters, Address stream) {
  raise_unless_ok(tde::cuda::small_logits_backward(own, other, grad, grad_col_stride, grad_own, at<float>(grad_divisor),
                                                   at<float>(floats), at<unsigned>(counters), at<void>(stream)));
}

tde::cuda::LogitsByproducts logits_byproducts(Address x_norms, Address w_norms, Address x_projections,
                                              Address w_projections) {
  return {at<float>(x_norms), at<float>(w_norms), at<float>(x_projections), at<float>(w_projections)};
}

void tiled_logits(const tde::Operand& features, const tde::Operand& weights, const tde::cuda::LogitsByproducts& by,
                  const tde::EmaUpdate& update, const tde::Matrix& out, bool hopper, Address floats, Address counters,
                  Address stream) {
  raise_unless_ok(tde::cuda::tiled_logits(features, weights, by, update, out, hopper, at<float>(floats),
                                          at<unsigned>(counters), at<void>(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  py::class_<tde::cuda::Scratch>(m, "Scratch")
      .def_readonly("floats", &tde::cuda::Scratch::floats)
      .def_readonly("counters", &tde::cuda::Scratch::counters);

  py::class_<tde::cuda::LogitsByproducts>(m, "LogitsByproducts")
      .def(py::init(&logits_byproducts), "x_norms"_a = 0, "w_norms"_a = 0, "x_projections"_a = 0,
           "w_projections"_a = 0);

  m.def("cuda_probe", [] { return tde::cuda::probe().error; }, "Why the current device cannot run the kernels, or ''.");
  m.def(
      "cuda_probe_hopper", [] { return tde::cuda::probe_hopper().error; },
      "Why the current device cannot run Hopper's kernels, or ''.");
  m.def("cuda_update_ema_scratch", &tde::cuda::update_ema_scratch, "x"_a);
  m.def("cuda_update_ema", &update_ema, no_gil, "x"_a, "update"_a, "floats"_a, "counters"_a, "stream"_a);
  m.def("cuda_fold_ema", &fold_ema, no_gil, "ema"_a, "num_updates"_a, "feature_sum"_a, "dim"_a, "momentum"_a,
        "stream"_a);
  m.def("cuda_normalize_rows", &normalize_rows, no_gil, "a"_a, "transform"_a, "out"_a, "norms"_a, "projections"_a,
        "stream"_a);
  m.def("cuda_normalize_rows_backward", &normalize_rows_backward, no_gil, "grad"_a, "a"_a, "norms"_a, "transform"_a,
        "grad_a"_a, "grad_divisor"_a, "stream"_a);
  m.def("cuda_background_exempt", &background_exempt, no_gil, "logits"_a, "row_projections"_a, "class_projections"_a,
        "heads"_a, "alpha"_a, "background"_a, "log"_a, "out"_a, "stream"_a);
  m.def("cuda_cross_entropy", &cross_entropy, no_gil, "logits"_a, "loss"_a, "pass"_a, "stream"_a);
  m.def("cuda_small_logits_fit", &tde::cuda::small_logits_fit, "dim"_a, "classes"_a, "heads"_a);
  m.def("cuda_small_logits_scratch", &tde::cuda::small_logits_scratch, "rows"_a, "dim"_a);
  m.def("cuda_small_logits", &small_logits, no_gil, "features"_a, "weights"_a, "update"_a, "out"_a, "floats"_a,
        "counters"_a, "stream"_a);
  m.def("cuda_small_logits_backward_scratch", &tde::cuda::small_logits_backward_scratch, "own_rows"_a, "other_rows"_a,
        "dim"_a, "heads"_a);
  m.def("cuda_small_logits_backward", &small_logits_backward, no_gil, "own"_a, "other"_a, "grad"_a, "grad_col_stride"_a,
        "grad_own"_a, "grad_divisor"_a, "floats"_a, "counters"_a, "stream"_a);
  m.def("cuda_tiled_logits_scratch", &tde::cuda::tiled_logits_scratch, "rows"_a, "classes"_a, "dim"_a, "hopper"_a);
  m.def("cuda_tiled_logits", &tiled_logits, no_gil, "features"_a, "weights"_a, "by"_a, "update"_a, "out"_a, "hopper"_a,
        "floats"_a, "counters"_a, "stream"_a);
}

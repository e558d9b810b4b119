// tde_kernels._C: addresses and sizes in, status out. Every call releases the GIL; a bad status is a RuntimeError.
#include "bindings.h"

#include "tde/alpha_sweep.h"
#include "tde/background_exempt.h"
#include "tde/build_info.h"
#include "tde/cross_entropy.h"
#include "tde/ema.h"
#include "tde/logits.h"
#include "tde/rows.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

void normalize_rows(const tde::Matrix& a, const tde::RowTransform& transform, const tde::Matrix& out, Address norms,
                    Address projections, Address mask, Address feature_sum, int threads) {
  const tde::RowByproducts byproducts{at<float>(norms), at<float>(projections), at<const bool>(mask),
                                      at<float>(feature_sum)};
  raise_unless_ok(tde::normalize_rows(a, transform, out, byproducts, threads));
}

void normalize_rows_backward(const tde::Matrix& grad, const tde::Matrix& a, Address norms,
                             const tde::RowTransform& transform, const tde::Matrix& grad_a, Address grad_divisor,
                             int threads) {
  raise_unless_ok(tde::normalize_rows_backward(grad, a, at<const float>(norms), transform, grad_a,
                                               at<float>(grad_divisor), threads));
}

void row_norms(const tde::Matrix& a, int64_t heads, Address norms, int threads) {
  raise_unless_ok(tde::row_norms(a, heads, at<float>(norms), threads));
}

void feature_sum(const tde::Matrix& x, Address mask, Address sum, int threads) {
  raise_unless_ok(tde::feature_sum(x, at<const bool>(mask), at<float>(sum), threads));
}

void fold_ema(Address ema, Address num_updates, Address sum, int64_t dim, float momentum) {
  raise_unless_ok(tde::fold_ema(at<float>(ema), at<int64_t>(num_updates), at<const float>(sum), dim, momentum));
}

tde::EmaUpdate ema_update(Address ema, Address num_updates, Address mask, float momentum, Address feature_sum) {
  return {at<float>(ema), at<int64_t>(num_updates), at<const bool>(mask), momentum, at<float>(feature_sum)};
}

void head_direction(Address ema, int64_t dim, int64_t heads, Address direction, int threads) {
  raise_unless_ok(tde::head_direction(at<const float>(ema), dim, heads, at<float>(direction), threads));
}

// Features [batch, dim] and weights [classes, dim] of one problem, in as few objects as calls have time for.
tde::Operands operands(Address x, int64_t x_stride, Address w, int64_t w_stride, tde::DType dtype, int64_t batch,
                       int64_t dim, int64_t classes, int64_t heads, float scale, tde::NormFactor feature_factor,
                       tde::NormFactor weight_factor, Address divisor, Address direction, Address alpha) {
  return {{{at<void>(x), dtype, batch, dim, x_stride},
           {heads, feature_factor, 1, nullptr, at<const float>(direction), at<const float>(alpha)}},
          {{at<void>(w), dtype, classes, dim, w_stride}, {heads, weight_factor, scale, at<const float>(divisor)}}};
}

// A dense matrix of the problem's dtype.
tde::Matrix dense(Address data, const tde::Operands& of, int64_t rows, int64_t cols) {
  return {at<void>(data), of.features.a.dtype, rows, cols, cols};
}

void small_logits(const tde::Operands& of, const tde::EmaUpdate& update, Address out, int threads) {
  const int64_t batch = of.features.a.rows, classes = of.weights.a.rows;
  raise_unless_ok(tde::small_logits(of, update, dense(out, of, batch, classes), threads));
}

void small_logits_backward(const tde::Operands& of, Address grad, int64_t grad_stride, Address grad_x, Address grad_w,
                           Address grad_divisor, int threads) {
  const int64_t batch = of.features.a.rows, dim = of.features.a.cols, classes = of.weights.a.rows;
  const tde::Matrix upstream{at<void>(grad), of.features.a.dtype, batch, classes, grad_stride};
  raise_unless_ok(tde::small_logits_backward(of, upstream, dense(grad_x, of, batch, dim),
                                             dense(grad_w, of, classes, dim), at<float>(grad_divisor), threads));
}

void background_exempt(const tde::Matrix& logits, Address row_projections, Address class_projections, int64_t heads,
                       Address alpha, int64_t background, bool log, const tde::Matrix& out, int threads) {
  raise_unless_ok(tde::background_exempt(logits, at<const float>(row_projections), at<const float>(class_projections),
                                         heads, at<const float>(alpha), background, log, out, threads));
}

tde::CrossEntropy loss_options(Address labels, Address scale, Address second_labels, Address second_scale,
                               Address class_weight, Address bias, Address margin, int64_t classes, int64_t ignored,
                               float smoothing, float focal) {
  return {{{at<const int64_t>(labels), at<const float>(scale)},
           {at<const int64_t>(second_labels), at<const float>(second_scale)}},
          at<const float>(class_weight),
          at<const float>(bias),
          at<const float>(margin),
          classes,
          ignored,
          smoothing,
          focal};
}

tde::LossPass loss_pass(int64_t first, bool take, Address sums, Address losses, bool gradient) {
  return {first, take, at<tde::SoftmaxSums>(sums), at<float>(losses), gradient};
}

void cross_entropy(const tde::Matrix& logits, const tde::CrossEntropy& loss, const tde::LossPass& pass, int threads) {
  raise_unless_ok(tde::cross_entropy(logits, loss, pass, threads));
}

void alpha_sweep(const tde::Matrix& logits, Address row_projections, Address class_projections, int64_t heads,
                 Address alphas, int64_t steps, Address winners, int threads) {
  const tde::Lines lines{logits, at<const float>(row_projections), at<const float>(class_projections), heads};
  raise_unless_ok(tde::alpha_sweep(lines, at<const double>(alphas), steps, at<int64_t>(winners), logits.rows, threads));
}

void alpha_segments(const tde::Matrix& logits, Address row_projections, Address class_projections, int64_t heads,
                    int64_t most, Address starts, Address classes, Address counts, int threads) {
  const tde::Lines lines{logits, at<const float>(row_projections), at<const float>(class_projections), heads};
  raise_unless_ok(
      tde::alpha_segments(lines, most, at<double>(starts), at<int64_t>(classes), at<int64_t>(counts), threads));
}

tde::RowTransform row_transform(int64_t heads, float offset, float power, float scale, Address divisor,
                                Address direction, Address alpha) {
  return {heads, {offset, power}, scale, at<const float>(divisor), at<const float>(direction), at<const float>(alpha)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of tde_kernels. Private: arguments are addresses, checked by tde_kernels.backends.";
  const py::call_guard<py::gil_scoped_release> no_gil;

  py::enum_<tde::DType>(m, "DType")
      .value("f32", tde::DType::f32)
      .value("bf16", tde::DType::bf16)
      .value("f16", tde::DType::f16);
  py::class_<tde::Matrix>(m, "Matrix")
      .def(py::init([](Address data, tde::DType dtype, int64_t rows, int64_t cols, int64_t row_stride) {
             return tde::Matrix{at<void>(data), dtype, rows, cols, row_stride};
           }),
           "data"_a, "dtype"_a, "rows"_a, "cols"_a, "row_stride"_a);
  py::class_<tde::RowTransform>(m, "RowTransform")
      .def(py::init(&row_transform), "heads"_a, "offset"_a, "power"_a, "scale"_a, "divisor"_a = 0, "direction"_a = 0,
           "alpha"_a = 0);
  py::class_<tde::Operand>(m, "Operand").def(py::init<tde::Matrix, tde::RowTransform>(), "a"_a, "transform"_a);
  py::class_<tde::NormFactor>(m, "NormFactor").def(py::init<float, float>(), "offset"_a, "power"_a);
  py::class_<tde::Operands>(m, "Operands")
      .def(py::init(&operands), "x"_a, "x_stride"_a, "w"_a, "w_stride"_a, "dtype"_a, "batch"_a, "dim"_a, "classes"_a,
           "heads"_a, "scale"_a, "feature_factor"_a, "weight_factor"_a, "divisor"_a, "direction"_a, "alpha"_a);
  py::class_<tde::EmaUpdate>(m, "EmaUpdate")
      .def(py::init(&ema_update), "ema"_a = 0, "num_updates"_a = 0, "mask"_a = 0, "momentum"_a = 0.f,
           "feature_sum"_a = 0);
  py::class_<tde::BuildInfo>(m, "BuildInfo")
      .def_readonly("version", &tde::BuildInfo::version)
      .def_readonly("compiler", &tde::BuildInfo::compiler)
      .def_readonly("threading", &tde::BuildInfo::threading)
      .def_readonly("instruction_set", &tde::BuildInfo::instruction_set)
      .def_readonly("cuda", &tde::BuildInfo::cuda)
      .def_readonly("has_cuda", &tde::BuildInfo::has_cuda)
      .def_readonly("emulated", &tde::BuildInfo::emulated)
      .def_readonly("intel_cpu", &tde::BuildInfo::intel_cpu);
  m.def("build_info", &tde::build_info);

  m.def("normalize_rows", &normalize_rows, no_gil, "a"_a, "transform"_a, "out"_a, "norms"_a = 0, "projections"_a = 0,
        "mask"_a = 0, "feature_sum"_a = 0, "threads"_a);
  m.def("normalize_rows_backward", &normalize_rows_backward, no_gil, "grad"_a, "a"_a, "norms"_a, "transform"_a,
        "grad_a"_a, "grad_divisor"_a = 0, "threads"_a);
  m.def("row_norms", &row_norms, no_gil, "a"_a, "heads"_a, "norms"_a, "threads"_a);
  m.def("feature_sum", &feature_sum, no_gil, "x"_a, "mask"_a, "feature_sum"_a, "threads"_a);
  m.def("fold_ema", &fold_ema, no_gil, "ema"_a, "num_updates"_a, "feature_sum"_a, "dim"_a, "momentum"_a);
  m.def("head_direction", &head_direction, no_gil, "ema"_a, "dim"_a, "heads"_a, "direction"_a, "threads"_a);
  m.def("small_logits", &small_logits, no_gil, "of"_a, "update"_a, "out"_a, "threads"_a);
  m.def("small_logits_backward", &small_logits_backward, no_gil, "of"_a, "grad"_a, "grad_stride"_a, "grad_x"_a,
        "grad_w"_a, "grad_divisor"_a, "threads"_a);
  m.def("background_exempt", &background_exempt, no_gil, "logits"_a, "row_projections"_a, "class_projections"_a,
        "heads"_a, "alpha"_a, "background"_a, "log"_a, "out"_a, "threads"_a);
  py::class_<tde::CrossEntropy>(m, "CrossEntropy")
      .def(py::init(&loss_options), "labels"_a, "scale"_a, "second_labels"_a, "second_scale"_a, "class_weight"_a,
           "bias"_a, "margin"_a, "classes"_a, "ignored"_a, "smoothing"_a, "focal"_a);
  py::class_<tde::LossPass>(m, "LossPass")
      .def(py::init(&loss_pass), "first"_a, "take"_a, "sums"_a, "losses"_a, "gradient"_a);
  m.def("cross_entropy", &cross_entropy, no_gil, "logits"_a, "loss"_a, "pass"_a, "threads"_a);

  m.def("alpha_sweep", &alpha_sweep, no_gil, "logits"_a, "row_projections"_a, "class_projections"_a, "heads"_a,
        "alphas"_a, "steps"_a, "winners"_a, "threads"_a);
  m.def("alpha_segments", &alpha_segments, no_gil, "logits"_a, "row_projections"_a, "class_projections"_a, "heads"_a,
        "most"_a, "starts"_a, "classes"_a, "counts"_a, "threads"_a);

#ifdef TDE_HAS_CUDA
  bind_cuda(m);
#endif
}

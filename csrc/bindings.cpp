// vitalrt._core: translates between Python and the C++ core, and nothing else. vitalrt/_core.pyi is its Python face.
//
// The pool's calls take microseconds and keep the GIL, which is what serialises access to it. A decoder step releases it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "block_pool.hpp"
#include "cpu_step.hpp"

namespace py = pybind11;
using vitalrt::BlockPool;
using vitalrt::CpuStep;
using vitalrt::LayerWeights;
using vitalrt::OutOfBlocks;
using vitalrt::StepCache;
using vitalrt::StepRows;
using vitalrt::StepShape;

namespace {

// Makes OutOfBlocksError, a child of vitalrt.errors.CapacityError that carries the two counts.
void bind_out_of_blocks(py::module_& m) {
  static py::gil_safe_call_once_and_store<py::object> storage;
  storage.call_once_and_store_result([&]() -> py::object {
    const py::object base = py::module_::import("vitalrt.errors").attr("CapacityError");
    return py::exception<OutOfBlocks>(m, "OutOfBlocksError", base);
  });
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) {
        std::rethrow_exception(pointer);
      }
    } catch (const OutOfBlocks& error) {
      const py::object& type = storage.get_stored();
      const py::object instance = type(error.what());
      instance.attr("requested") = error.requested;
      instance.attr("free") = error.free;
      PyErr_SetObject(type.ptr(), instance.ptr());
    }
  });
}

// Addresses come as integers (torch.Tensor.data_ptr): the core takes plain memory, and Python keeps it alive.
template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using LayerAddresses = std::array<std::uintptr_t, 7>;

std::unique_ptr<CpuStep> make_cpu_step(std::int64_t hidden_size, std::int64_t num_heads, std::int64_t num_kv_heads,
                                       std::int64_t head_dim, std::int64_t intermediate_size, float rms_norm_eps,
                                       const std::vector<LayerAddresses>& layers, std::uintptr_t final_norm,
                                       std::uintptr_t inverse_frequencies, std::uintptr_t k_cache,
                                       std::uintptr_t v_cache, std::int64_t num_slots) {
  std::vector<LayerWeights> weights;
  for (const LayerAddresses& layer : layers) {
    weights.push_back({at<const float>(layer[0]), at<const float>(layer[1]), at<const float>(layer[2]),
                       at<const float>(layer[3]), at<const float>(layer[4]), at<const float>(layer[5]),
                       at<const float>(layer[6])});
  }
  return std::make_unique<CpuStep>(
      StepShape{hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, rms_norm_eps}, std::move(weights),
      at<const float>(final_norm), at<const float>(inverse_frequencies),
      StepCache{at<float>(k_cache), at<float>(v_cache), num_slots});
}

void run_cpu_step(const CpuStep& step, std::int64_t batch, std::int64_t row_length, std::uintptr_t slots,
                  std::uintptr_t lengths, std::uintptr_t positions, std::uintptr_t inputs, std::uintptr_t hidden) {
  step.run(StepRows{batch, row_length, at<const std::int64_t>(slots), at<const std::int64_t>(lengths),
                    at<const std::int64_t>(positions)},
           at<const float>(inputs), at<float>(hidden));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of vitalrt.";
  bind_out_of_blocks(m);

  py::class_<BlockPool>(m, "BlockPool")
      .def(py::init<std::int32_t>(), py::arg("num_blocks"))
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def("allocate", &BlockPool::allocate, py::arg("count"))
      .def("retain", &BlockPool::retain, py::arg("blocks"))
      .def("release", &BlockPool::release, py::arg("blocks"))
      .def("ref_count", &BlockPool::ref_count, py::arg("block"))
      .def("largest_run", &BlockPool::largest_run)
      .def("check_integrity", &BlockPool::check_integrity);

  py::class_<CpuStep>(m, "CpuStep")
      .def(py::init(&make_cpu_step), py::kw_only(), py::arg("hidden_size"), py::arg("num_heads"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("intermediate_size"), py::arg("rms_norm_eps"),
           py::arg("layers"), py::arg("final_norm"), py::arg("inverse_frequencies"), py::arg("k_cache"),
           py::arg("v_cache"), py::arg("num_slots"))
      .def("run", &run_cpu_step, py::arg("batch"), py::arg("row_length"), py::arg("slots"), py::arg("lengths"),
           py::arg("positions"), py::arg("inputs"), py::arg("hidden"), py::call_guard<py::gil_scoped_release>());
}

// vitalrt._core: translates between Python and the C++ core, and nothing else. vitalrt/_core.pyi is its Python face.
//
// The GIL is kept throughout: every call takes microseconds, and the GIL is what serialises access to the pool.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_pool.hpp"

namespace py = pybind11;
using vitalrt::BlockPool;
using vitalrt::OutOfBlocks;

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
}

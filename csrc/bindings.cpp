// vitalrt._core: translates between Python and the C++ core, and nothing else. vitalrt/_core.pyi is its Python face.
//
// The pool's calls take microseconds and keep the GIL. A decoder pass and the prefix cache's calls release it: none of
// them waits for it, so a thread that holds it may wait for them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "block_pool.hpp"
#include "cpu_decoder.hpp"
#include "prefix_cache.hpp"

namespace py = pybind11;
using vitalrt::BlockPool;
using vitalrt::CpuDecoder;
using vitalrt::DecoderCache;
using vitalrt::DecoderShape;
using vitalrt::Deepstack;
using vitalrt::Keys;
using vitalrt::LayerWeights;
using vitalrt::NewTokens;
using vitalrt::OutOfBlocks;
using vitalrt::Pages;
using vitalrt::PagesView;
using vitalrt::PrefixCache;
using vitalrt::PrefixCacheStatistics;
using vitalrt::PrefixKey;
using vitalrt::Rope;
using vitalrt::Span;
using vitalrt::Team;
using vitalrt::Trunk;

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

std::unique_ptr<CpuDecoder> make_cpu_decoder(std::int64_t hidden_size, std::int64_t num_heads,
                                             std::int64_t num_kv_heads, std::int64_t head_dim,
                                             std::int64_t intermediate_size, float rms_norm_eps,
                                             const std::vector<LayerAddresses>& layers, std::uintptr_t final_norm,
                                             std::uintptr_t inverse_frequencies, std::uintptr_t axes,
                                             std::uintptr_t k_cache, std::uintptr_t v_cache, std::int64_t num_slots) {
  std::vector<LayerWeights> weights;
  for (const LayerAddresses& layer : layers) {
    weights.push_back({at<const float>(layer[0]), at<const float>(layer[1]), at<const float>(layer[2]),
                       at<const float>(layer[3]), at<const float>(layer[4]), at<const float>(layer[5]),
                       at<const float>(layer[6])});
  }
  return std::make_unique<CpuDecoder>(
      DecoderShape{hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, rms_norm_eps},
      weights, at<const float>(final_norm),
      Rope{at<const float>(inverse_frequencies), at<const std::int64_t>(axes)},
      DecoderCache{at<float>(k_cache), at<float>(v_cache), num_slots});
}

void run_cpu_decoder(const CpuDecoder& decoder, std::int64_t batch, std::int64_t row_length, std::uintptr_t slots,
                     std::uintptr_t lengths, std::uintptr_t counts, std::int64_t num_axes, std::uintptr_t positions,
                     std::uintptr_t inputs, std::uintptr_t hidden, std::int64_t num_image_rows,
                     std::uintptr_t image_rows, const std::vector<std::uintptr_t>& deepstack,
                     std::uintptr_t start_threads, std::size_t num_threads) {
  const py::gil_scoped_release release;
  Deepstack features{num_image_rows, at<const std::int64_t>(image_rows)};
  for (const std::uintptr_t address : deepstack) {
    features.features.push_back(at<const float>(address));
  }
  decoder.run(NewTokens{batch, row_length, at<const std::int64_t>(slots), at<const std::int64_t>(lengths),
                        at<const std::int64_t>(counts), num_axes, at<const std::int64_t>(positions)},
              features, at<const float>(inputs), at<float>(hidden),
              Team{reinterpret_cast<decltype(Team::start)>(start_threads), num_threads});
}

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void check_axis(const char* name, const py::array& array) {
  if (array.ndim() != 1) {
    throw std::invalid_argument(std::string(name) + ": expected one axis, got " + std::to_string(array.ndim()));
  }
}

std::unique_ptr<PrefixKey> make_prefix_key(std::string_view digests, const Array<std::uint32_t>& positions) {
  check_axis("positions", positions);
  return std::make_unique<PrefixKey>(
      Span<std::uint8_t>{reinterpret_cast<const std::uint8_t*>(digests.data()), digests.size()},
      Span<std::uint32_t>{positions.data(), static_cast<std::size_t>(positions.size())});
}

// Looks into the key, which it keeps alive.
py::array positions_of(const py::object& self) {
  const auto positions = self.cast<const PrefixKey&>().positions();
  Array<std::uint32_t> array(static_cast<py::ssize_t>(positions.size), positions.data, self);
  array.attr("flags").attr("writeable") = false;
  return array;
}

py::bytes digests_of(const PrefixKey& key) {
  return {reinterpret_cast<const char*>(key.digests().data), key.digests().size};
}

Array<std::int32_t> to_array(const Pages& pages) {
  Array<std::int32_t> array(static_cast<py::ssize_t>(pages.size()));
  std::copy(pages.begin(), pages.end(), array.mutable_data());
  return array;
}

// Keys are immutable, so a call reads them without the GIL. It holds them itself, whatever becomes of the list.
class HeldKeys {
 public:
  explicit HeldKeys(const py::sequence& keys) : objects_(keys) {
    // pybind11's own cast would look up the bases of each key's type; the C++ part of a key lies where it always does.
    auto* const type = reinterpret_cast<PyTypeObject*>(py::type::of<PrefixKey>().ptr());
    keys_.reserve(objects_.size());
    for (const py::handle key : objects_) {
      const auto* object = reinterpret_cast<const py::detail::instance*>(key.ptr());
      const bool is_key = PyObject_TypeCheck(key.ptr(), type) != 0 && object->simple_layout;
      const void* value = is_key ? object->simple_value_holder[0] : nullptr;  // null before __init__
      if (value == nullptr) {
        throw py::type_error("keys: expected PrefixKey, got " + std::string(Py_TYPE(key.ptr())->tp_name));
      }
      keys_.push_back(static_cast<const PrefixKey*>(value));
    }
  }
  const Keys& keys() const { return keys_; }

 private:
  const py::tuple objects_;
  Keys keys_;
};

// A copy of each request's pages, since anyone may write to arrays and lists while a call runs without the GIL.
class CopiedPages {
 public:
  explicit CopiedPages(const py::sequence& batch) {
    const py::tuple objects(batch);
    views_.reserve(objects.size());
    for (const py::handle one : objects) {
      if (Array<std::int32_t>::check_(one)) {
        add(py::reinterpret_borrow<Array<std::int32_t>>(one));
      } else {
        using Converted = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;
        add(Converted(py::reinterpret_borrow<py::object>(one)));
      }
    }
    const std::int32_t* next = pages_.data();
    for (PagesView& view : views_) {
      view.data = next;
      next += view.size;
    }
  }
  const std::vector<PagesView>& views() const { return views_; }

 private:
  void add(const py::array& array) {
    check_axis("pages", array);
    const auto* first = static_cast<const std::int32_t*>(array.data());
    pages_.insert(pages_.end(), first, first + array.size());
    views_.push_back({nullptr, static_cast<std::size_t>(array.size())});
  }

  Pages pages_;
  std::vector<PagesView> views_;
};

std::vector<Array<std::int32_t>> match_prefixes(PrefixCache& cache, const py::sequence& batch) {
  const HeldKeys held(batch);
  std::vector<Pages> matched;
  {
    const py::gil_scoped_release release;
    matched = cache.match(held.keys());
  }
  std::vector<Array<std::int32_t>> arrays;
  arrays.reserve(matched.size());
  for (const Pages& pages : matched) {
    arrays.push_back(to_array(pages));
  }
  return arrays;
}

std::int64_t insert_prefixes(PrefixCache& cache, const py::sequence& batch, const py::sequence& pages) {
  const HeldKeys held(batch);
  const CopiedPages copied(pages);
  const py::gil_scoped_release release;
  return cache.insert(held.keys(), copied.views());
}

std::int64_t release_pages(PrefixCache& cache, const py::sequence& pages) {
  const CopiedPages copied(pages);
  const py::gil_scoped_release release;
  return cache.release(copied.views());
}

std::vector<std::tuple<Array<std::int32_t>, std::int32_t, std::int32_t>> fork_pages(
    PrefixCache& cache, const py::sequence& pages, const std::vector<std::int64_t>& num_tokens) {
  const CopiedPages copied(pages);
  if (copied.views().size() != num_tokens.size()) {
    throw std::invalid_argument("pages and num_tokens: expected as many, got " + std::to_string(copied.views().size()) +
                                " and " + std::to_string(num_tokens.size()));
  }
  std::vector<Trunk> trunks;
  for (std::size_t index = 0; index < num_tokens.size(); ++index) {
    trunks.push_back({copied.views()[index], num_tokens[index]});
  }
  std::vector<vitalrt::Branch> branches;
  {
    const py::gil_scoped_release release;
    branches = cache.fork(trunks);
  }
  std::vector<std::tuple<Array<std::int32_t>, std::int32_t, std::int32_t>> result;
  for (const auto& branch : branches) {
    result.emplace_back(to_array(branch.pages), branch.copy_from, branch.copy_to);
  }
  return result;
}

void bind_prefix_cache(py::module_& m) {
  py::class_<PrefixKey>(m, "PrefixKey")
      .def(py::init(&make_prefix_key), py::arg("digests"), py::arg("positions").noconvert())
      .def_property_readonly("digests", &digests_of)
      .def_property_readonly("positions", &positions_of)
      .def("num_shared", &PrefixKey::num_shared, py::arg("other"));

  py::class_<PrefixCacheStatistics>(m, "PrefixCacheStatistics")
      .def_readonly("requests", &PrefixCacheStatistics::requests)
      .def_readonly("pages_queried", &PrefixCacheStatistics::pages_queried)
      .def_readonly("pages_hit", &PrefixCacheStatistics::pages_hit)
      .def_readonly("tokens_hit", &PrefixCacheStatistics::tokens_hit)
      .def_readonly("pages_inserted", &PrefixCacheStatistics::pages_inserted)
      .def_readonly("pages_duplicate", &PrefixCacheStatistics::pages_duplicate)
      .def_readonly("pages_evicted", &PrefixCacheStatistics::pages_evicted)
      .def_readonly("pages_cached", &PrefixCacheStatistics::pages_cached)
      .def_readonly("pages_idle", &PrefixCacheStatistics::pages_idle);

  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  py::class_<PrefixCache>(m, "PrefixCache")
      .def(py::init<BlockPool&, std::int32_t>(), py::arg("pool"), py::arg("page_size"), py::keep_alive<1, 2>())
      .def("match", &match_prefixes, py::arg("keys"))
      .def("insert", &insert_prefixes, py::arg("keys"), py::arg("pages"))
      .def("release", &release_pages, py::arg("pages"))
      .def("fork", &fork_pages, py::arg("pages"), py::arg("num_tokens"))
      .def("evict", &PrefixCache::evict, py::arg("count"), WithoutGil())
      .def("statistics", &PrefixCache::statistics, WithoutGil())
      .def("check_integrity", &PrefixCache::check_integrity, WithoutGil());
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

  py::class_<CpuDecoder>(m, "CpuDecoder")
      .def(py::init(&make_cpu_decoder), py::kw_only(), py::arg("hidden_size"), py::arg("num_heads"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("intermediate_size"), py::arg("rms_norm_eps"),
           py::arg("layers"), py::arg("final_norm"), py::arg("inverse_frequencies"), py::arg("axes"),
           py::arg("k_cache"), py::arg("v_cache"), py::arg("num_slots"))
      .def_property_readonly("num_bytes", &CpuDecoder::num_bytes)
      .def("run", &run_cpu_decoder, py::arg("batch"), py::arg("row_length"), py::arg("slots"), py::arg("lengths"),
           py::arg("counts"), py::arg("num_axes"), py::arg("positions"), py::arg("inputs"), py::arg("hidden"),
           py::arg("num_image_rows"), py::arg("image_rows"), py::arg("deepstack"), py::arg("start_threads"),
           py::arg("num_threads"));

  bind_prefix_cache(m);
}

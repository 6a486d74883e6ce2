// The offset planner and the arena for Python. Memory crosses as DLPack capsules and addresses.
#include "memory.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "accelrt/check.h"
#include "runtime/arena.h"
#include "runtime/offset_planner.h"

namespace py = pybind11;

namespace accelrt::bindings {
namespace {

// Bad arguments are a ValueError in Python.
template <typename Fn>
auto checked(const Fn& fn) {
  try {
    return fn();
  } catch (const Error& error) { throw py::value_error(error.what()); }
}

OffsetPlan plan(const std::vector<int64_t>& sizes, const std::vector<int64_t>& firsts,
                const std::vector<int64_t>& lasts, int64_t alignment) {
  return checked([&] {
    ACCELRT_CHECK(sizes.size() == firsts.size() && sizes.size() == lasts.size(),
                  "plan_offsets: ", sizes.size(), " sizes, ", firsts.size(), " firsts and ",
                  lasts.size(), " lasts");
    std::vector<BufferLife> buffers;
    buffers.reserve(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) buffers.push_back({sizes[i], firsts[i], lasts[i]});
    return plan_offsets(buffers, alignment);
  });
}

bool python_is_going() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsInitialized() == 0 || Py_IsFinalizing() != 0;
#else
  return Py_IsInitialized() == 0 || _Py_IsFinalizing() != 0;
#endif
}

// The last block of a slab may die in a thread that does not hold the interpreter's lock.
std::shared_ptr<void> keep(py::object object) {
  return std::shared_ptr<void>(object.release().ptr(), [](void* pointer) {
    if (python_is_going()) return;
    const py::gil_scoped_acquire gil;
    Py_DECREF(static_cast<PyObject*>(pointer));
  });
}

void free_untaken(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) return;  // a tensor has taken it
  auto* tensor =
      static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
  tensor->deleter(tensor);
}

Arena make_arena(int32_t device_type, int32_t device_id, int64_t alignment) {
  return checked([&] { return Arena({device_type, device_id}, alignment); });
}

void set_slab(Arena& arena, uintptr_t address, int64_t bytes, py::object owner) {
  checked([&] {
    arena.set_slab(reinterpret_cast<void*>(address), bytes, keep(std::move(owner)));
    return 0;
  });
}

std::optional<py::capsule> allocate(Arena& arena, int64_t bytes, int64_t preferred, uint8_t code,
                                    uint8_t bits, std::vector<int64_t> shape,
                                    std::vector<int64_t> strides) {
  return checked([&]() -> std::optional<py::capsule> {
    ArenaBlock block = arena.allocate(bytes, preferred);
    if (!block) return std::nullopt;
    dlpack::ManagedTensor* tensor =
        to_dlpack(std::move(block), {code, bits, 1}, std::move(shape), std::move(strides));
    PyObject* capsule = PyCapsule_New(tensor, dlpack::kCapsuleName, &free_untaken);
    if (capsule == nullptr) {
      tensor->deleter(tensor);
      throw py::error_already_set();
    }
    return py::reinterpret_steal<py::capsule>(capsule);
  });
}

template <int64_t ArenaCounters::* kField>
int64_t counter(const Arena& arena) {
  return arena.counters().*kField;
}

}  // namespace

void bind_memory(py::module_& m) {
  py::class_<OffsetPlan>(m, "OffsetPlan", "Offsets of buffers in one slab.")
      .def_readonly("offsets", &OffsetPlan::offsets, "One per buffer, in bytes.")
      .def_readonly("slab_bytes", &OffsetPlan::slab_bytes, "What the offsets need.")
      .def_readonly("bound_bytes", &OffsetPlan::bound_bytes,
                    "Most bytes alive in any step: no plan needs less.")
      .def_property_readonly("fragmentation", &OffsetPlan::fragmentation,
                             "slab_bytes / bound_bytes - 1.");
  m.def("plan_offsets", &plan, py::arg("sizes"), py::arg("firsts"), py::arg("lasts"),
        py::arg("alignment"),
        "Offsets for buffers of sizes[i] bytes, alive in the steps firsts[i]..lasts[i].");
  py::class_<Arena>(m, "Arena", "Hands out blocks of a slab; see accelrt.memory.arena.")
      .def(py::init(&make_arena), py::arg("device_type"), py::arg("device_id"),
           py::arg("alignment") = 0)
      .def("set_slab", &set_slab, py::arg("address"), py::arg("bytes"), py::arg("owner"),
           "Take new blocks from this memory; `owner` lives as long as its blocks.")
      .def("release", &Arena::release, "Forget the slab.")
      .def("allocate", &allocate, py::arg("bytes"), py::arg("preferred"), py::arg("code"),
           py::arg("bits"), py::arg("shape"), py::arg("strides"),
           "A DLPack capsule over a new block, or None if it does not fit.")
      .def("return_free_pages", &Arena::return_free_pages,
           "Give the free ranges' pages back to the system; returns their bytes.")
      .def("reset_peak", &Arena::reset_peak)
      .def_property_readonly("alignment", &Arena::alignment)
      .def_property_readonly("slab_bytes", &Arena::slab_bytes)
      .def_property_readonly("live_bytes", &counter<&ArenaCounters::live_bytes>)
      .def_property_readonly("peak_bytes", &counter<&ArenaCounters::peak_bytes>)
      .def_property_readonly("blocks", &counter<&ArenaCounters::blocks>)
      .def_property_readonly("misplaced", &counter<&ArenaCounters::misplaced>)
      .def_property_readonly("refused", &counter<&ArenaCounters::refused>)
      .def_property_readonly("refused_bytes", &counter<&ArenaCounters::refused_bytes>);
}

}  // namespace accelrt::bindings

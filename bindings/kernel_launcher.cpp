// A Python function as the launcher of kernels that are compiled at run time.
#include "accelrt/kernel_launcher.h"

#include <array>
#include <string>

#include <pybind11/stl.h>

#include "accelrt/check.h"
#include "kernel_launcher_bindings.h"

namespace py = pybind11;

namespace accelrt::bindings {
namespace {

// Of the process, and never destroyed: at exit the interpreter may be gone before it.
py::object& launcher() {
  static auto* held = new py::object(py::none());
  return *held;
}

// Torch calls operators without the GIL.
void call_python(const KernelLaunch& launch) {
  std::string message;
  {
    const py::gil_scoped_acquire gil;
    try {
      launcher()(launch.op, launch.source, launch.kernel,
                 py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]), launch.threads,
                 launch.shared_bytes, reinterpret_cast<uintptr_t>(launch.stream),
                 reinterpret_cast<uintptr_t>(launch.params), launch.params_bytes);
      return;
    } catch (const py::error_already_set& error) {
      // A Python exception must not cross torch's dispatcher, which knows nothing of the GIL.
      message = py::str(error.value());
      if (message.empty()) message = py::str(error.type());
    }
  }
  throw Error(std::string(launch.op) + ": " + message);
}

void set_launcher(const py::object& function) {
  launcher() = function;
  set_kernel_launcher(function.is_none() ? nullptr : &call_python);
}

void launch_bytes(const std::string& op, const std::string& source, const std::string& kernel,
                  std::array<int64_t, 3> grid, int threads, int64_t shared_bytes, uintptr_t stream,
                  const py::bytes& params) {
  const std::string bytes = params;
  const py::gil_scoped_release released;
  launch_kernel({op.c_str(),
                 source.c_str(),
                 kernel.c_str(),
                 {grid[0], grid[1], grid[2]},
                 threads,
                 shared_bytes,
                 reinterpret_cast<Stream>(stream),
                 bytes.data(),
                 bytes.size()});
}

py::list names() {
  py::list list;
  for (const KernelName& name : kernel_names()) {
    list.append(py::make_tuple(name.source, name.kernel, name.params_bytes));
  }
  return list;
}

}  // namespace

void bind_kernel_launcher(py::module_& m) {
  m.def("set_kernel_launcher", &set_launcher, py::arg("function").none(true),
        "Let function(op, source, kernel, grid, threads, shared_bytes, stream, params, "
        "params_bytes) run the kernels of a build without nvcc; params is an address. None: none.");
  m.def("launch_kernel", &launch_bytes, py::arg("op"), py::arg("source"), py::arg("kernel"),
        py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"), py::arg("stream"),
        py::arg("params"), "Hand a launch to that function, as the operators do.");
  m.def("kernel_names", &names,
        "(source, kernel, bytes of its params) of every kernel that is compiled at run time.");
}

}  // namespace accelrt::bindings

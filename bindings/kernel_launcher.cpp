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

struct Functions {
  py::object launch = py::none();
  py::object attribute = py::none();
};

// Of the process, and never destroyed: at exit the interpreter may be gone before it.
Functions& functions() {
  static auto* held = new Functions;
  return *held;
}

// Calls `function` with the GIL, which torch does not hold when it runs an operator. A Python
// exception must not cross torch's dispatcher, which knows nothing of the GIL.
template <typename Function>
auto with_python(const std::string& what, const Function& function) {
  std::string message;
  {
    const py::gil_scoped_acquire gil;
    try {
      return function();
    } catch (const py::error_already_set& error) {
      message = py::str(error.value());
      if (message.empty()) message = py::str(error.type());
    }
  }
  throw Error(what + ": " + message);
}

void call_launch(const KernelLaunch& launch) {
  with_python(launch.op, [&] {
    functions().launch(launch.op, launch.folder, launch.kernel,
                       py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]),
                       launch.threads, launch.shared_bytes,
                       reinterpret_cast<uintptr_t>(launch.stream),
                       reinterpret_cast<uintptr_t>(launch.params), launch.params_bytes);
  });
}

int call_attribute(int attribute) {
  return with_python("attribute " + std::to_string(attribute) + " of the device",
                     [&] { return functions().attribute(attribute).cast<int>(); });
}

void set_functions(const py::object& launch, const py::object& attribute) {
  functions() = {launch, attribute};
  set_kernel_launcher(launch.is_none() ? nullptr : &call_launch,
                      attribute.is_none() ? nullptr : &call_attribute);
}

void launch_bytes(const std::string& op, const std::string& folder, const std::string& kernel,
                  std::array<int64_t, 3> grid, int threads, int64_t shared_bytes, uintptr_t stream,
                  const py::bytes& params) {
  const std::string bytes = params;
  const py::gil_scoped_release released;
  launch_kernel({op.c_str(),
                 folder.c_str(),
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
    list.append(py::make_tuple(name.folder, name.kernel, name.params_bytes));
  }
  return list;
}

}  // namespace

void bind_kernel_launcher(py::module_& m) {
  m.def("set_kernel_launcher", &set_functions, py::arg("launch").none(true),
        py::arg("attribute").none(true),
        "Let launch(op, folder, kernel, grid, threads, shared_bytes, stream, params, params_bytes) "
        "run the kernels of a build without nvcc (params is an address) and attribute(number) tell "
        "its launchers about the current device. None: none.");
  m.def("launch_kernel", &launch_bytes, py::arg("op"), py::arg("folder"), py::arg("kernel"),
        py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"), py::arg("stream"),
        py::arg("params"), "Hand a launch to that function, as the operators do.");
  m.def(
      "device_attribute",
      [](int attribute) {
        const py::gil_scoped_release released;
        return device_attribute(attribute);
      },
      py::arg("attribute"), "Ask for a device's attribute, as the operators do.");
  m.def("kernel_names", &names,
        "(folder, kernel, bytes of its params) of every kernel that is compiled at run time.");
}

}  // namespace accelrt::bindings

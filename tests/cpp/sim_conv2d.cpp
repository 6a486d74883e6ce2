#include "kernels/conv2d/conv2d.h"
#include "sim_io.h"

namespace accelrt::sim {
namespace {

const Register kConv2d("conv2d", [](const Arguments& a) {
  conv2d(a.tensor("x"), a.tensor("weight"), a.optional("bias"),
         {a.integer("stride_height"), a.integer("stride_width"), a.integer("padding_height"),
          a.integer("padding_width")},
         a.tensor("out"));
});

}  // namespace
}  // namespace accelrt::sim

// Bindings of the bfloat16 products, which csrc/bindings.cpp adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace fastcontrast {

void bind_bf16_products(pybind11::module_& m);

}  // namespace fastcontrast

// What the program's user can mend: it is told in one sentence, and the program ends with status 2.
#pragma once

#include <stdexcept>

namespace dashclip {

struct BadInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace dashclip

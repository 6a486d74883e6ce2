// One product of tiles, in both forms of accelrt/tiles.h.
#pragma once

#include "tile_model.h"

namespace accelrt::amx {
// sum += left right.
void multiply_once(tiles::Tile& sum, const tiles::Tile& left, const tiles::Tile& right);
}  // namespace accelrt::amx

namespace accelrt::amx_emulated {
void multiply_once(tiles::Tile& sum, const tiles::Tile& left, const tiles::Tile& right);
}  // namespace accelrt::amx_emulated

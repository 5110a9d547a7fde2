// Waiting for what will be there in a moment, where nothing tells when.
#pragma once

namespace unmoor {

// Lets others run; sleeps (20 µs) only from the 64th turn on.
void WaitALittle(int turn);

}  // namespace unmoor

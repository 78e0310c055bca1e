"use strict";
// The last of the scripts: draw everything.

function draw() { legend(); rankingTable(); pointsTable(); parallel(); curves(); effects(); importance(); contour(); trials(); costs(); timeline(); }
themed(resized => { if (resized) state.brushes = {}; draw(); });
head(); failed(); samples(); draw();
